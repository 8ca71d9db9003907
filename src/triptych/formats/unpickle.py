"""A pickle as inert data. No class is looked up, nothing is imported, nothing is called.

A pickle is a program for a stack machine. Most of its instructions make numbers, texts and containers; a few make Python import a name and
call it. Here those only write down what was asked: `Name` for an import, `Call` for a call. Whoever reads the result knows a few names
(`torch._utils._rebuild_tensor_v2`) and takes their arguments as the description that they are.

Every instruction takes constant time, or time in proportion to the bytes or items it consumes; the number of instructions is limited,
nothing here recurses, and no value is hashed: a table is a list of keys and values.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ..errors import FormatError, PlanError

MAX_NAME = 512
MAX_NUMBER = 255
TABLES = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"})
RUNS_CODE = frozenset({
    "os", "posix", "nt", "pty", "subprocess", "sys", "runpy", "importlib", "imp", "shutil", "socket", "ctypes", "code", "codeop", "marshal",
    "webbrowser", "pdb", "commands", "pip", "torch.hub", "torch.load", "pickle.load", "pickle.loads", "_pickle.load", "_pickle.loads",
    "builtins.eval", "builtins.exec", "builtins.execfile", "builtins.compile", "builtins.open", "builtins.input", "builtins.breakpoint",
    "builtins.__import__",
})  # fmt: skip
"""Modules and functions that no checkpoint has an honest use for. Safety does not rest on this list: nothing at all is called."""


class Table(list[Any]):
    """A dict as [key, value, key, value, ...]."""

    __slots__ = ()


class Name(str):
    """`module.name` that the pickle wanted imported."""

    __slots__ = ()


class Call:
    """A call that the pickle wanted made; `parts` are its arguments and whatever was put into its result."""

    __slots__ = ("name", "parts")

    def __init__(self, name: str, parts: list[Any]) -> None:
        self.name, self.parts = name, parts


class Outside:
    """A reference to something outside of the pickle, by its id."""

    __slots__ = ("id",)

    def __init__(self, id: object) -> None:
        self.id = id


def load(raw: bytes, file: str, limit: int) -> object:
    r"""The one value of a pickle of at most `limit` instructions.

    >>> load(b"\x80\x02}(X\x01\0\0\0aK\x05u.", "file", 100)
    ['a', 5]
    >>> load(b"\x80\x02cos\nsystem\n.", "file", 100)
    Traceback (most recent call last):
    triptych.errors.PlanError: the file asks to run code
      file     file
      found    os.system
      try      nothing of it was run; do not load this file with torch or pickle either

    Raises FormatError (damaged, too long, another protocol than 2 to 5), PlanError (it asks to run code).
    """
    machine = _Machine(raw, file, limit)
    try:
        return machine.run()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError):
        raise FormatError("the pickle is damaged", file=file, found=f"instruction before byte {machine.at} of {len(raw)}") from None


class _Machine:
    def __init__(self, raw: bytes, file: str, limit: int) -> None:
        self.raw, self.file, self.left, self.limit = raw, file, limit, limit
        self.at = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> object:
        """The value that the pickle builds. Raises what `load` says."""
        raw, steps = self.raw, _STEPS
        while True:
            code = raw[self.at]
            self.at += 1
            self.left -= 1
            if self.left < 0:
                self.spend(0)
            if code == 0x2E:  # STOP
                if self.at != len(raw) or len(self.stack) != 1 or self.below:
                    raise self.damaged("bytes or values are left over at its end")
                return self.stack[0]
            step = steps.get(code)
            if step is None:
                raise FormatError("a pickle instruction that is not read here", file=self.file, found=f"0x{code:02x} at byte {self.at - 1}",
                                  expected="pickle protocol 2 to 5")  # fmt: skip
            step(self)

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise FormatError("the pickle is too long", file=self.file, expected=f"at most {self.limit} instructions",
                              try_="save the tensors alone, without other objects")  # fmt: skip

    def damaged(self, what: str) -> FormatError:
        return FormatError("the pickle is damaged", file=self.file, found=f"{what}, before byte {self.at}")

    def byte(self) -> int:
        self.at += 1
        return self.raw[self.at - 1]

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def take(self, size: int) -> bytes:
        start = self.at
        self.at += size
        if self.at > len(self.raw):
            raise self.damaged(f"{size} bytes wanted, {len(self.raw) - start} there")
        return self.raw[start : self.at]

    def line(self) -> str:
        end = self.raw.find(b"\n", self.at, self.at + MAX_NAME)
        if end < 0:
            raise self.damaged("a name without an end")
        return self.take(end + 1 - self.at)[:-1].decode()

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items


# What the instructions do


def _proto(m: _Machine) -> None:
    version = m.byte()
    if not 2 <= version <= 5:
        raise FormatError("another pickle protocol", file=m.file, expected="2 to 5", found=version)


def _frame(m: _Machine) -> None:
    m.take(8)


def _mark(m: _Machine) -> None:
    m.below.append(m.stack)
    m.stack = []


def _pop(m: _Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.since_mark()


def _pop_mark(m: _Machine) -> None:
    m.since_mark()


def _push(value: object) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.stack.append(value)

    return step


def _new(kind: type[list[Any]]) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.stack.append(kind())

    return step


def _byte(m: _Machine) -> None:
    m.stack.append(m.byte())


def _integer(size: int, signed: bool = False) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.stack.append(m.number(size, signed))

    return step


def _long(size: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        length = m.number(size)
        if length > MAX_NUMBER:
            raise FormatError("a number is too long", file=m.file, expected=f"at most {MAX_NUMBER} bytes", found=f"{length} bytes")
        m.stack.append(m.number(length, True))

    return step


def _float(m: _Machine) -> None:
    m.stack.append(struct.unpack(">d", m.take(8))[0])


def _text(size: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.stack.append(m.take(m.number(size)).decode("utf-8", "surrogatepass"))

    return step


def _bytes(size: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.stack.append(m.take(m.number(size)))

    return step


def _tuple(count: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        if len(m.stack) < count:
            raise IndexError
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return step


def _tuple_of_all(m: _Machine) -> None:
    items = m.since_mark()
    m.stack.append(tuple(items))


def _list_of_all(m: _Machine) -> None:
    items = m.since_mark()
    m.stack.append(items)


def _append(m: _Machine) -> None:
    item = m.stack.pop()
    _into(m, [item])


def _appends(m: _Machine) -> None:
    _into(m, m.since_mark())


def _set(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _into(m, [key, value], pairs=True)


def _sets(m: _Machine) -> None:
    _into(m, m.since_mark(), pairs=True)


def _table(m: _Machine) -> None:
    items = m.since_mark()
    m.stack.append(Table())
    _into(m, items, pairs=True)


def _into(m: _Machine, items: list[Any], pairs: bool = False) -> None:
    target = m.stack[-1]
    if isinstance(target, Call):
        target.parts.extend(items)
    elif isinstance(target, list) and isinstance(target, Table) is pairs and (not pairs or len(items) % 2 == 0):
        target.extend(items)
    else:
        raise m.damaged("items for something that is no container")


def _put(m: _Machine) -> None:
    m.memo[m.byte()] = m.stack[-1]


def _long_put(m: _Machine) -> None:
    m.memo[m.number(4)] = m.stack[-1]


def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _get(m: _Machine) -> None:
    m.stack.append(m.memo[m.byte()])


def _long_get(m: _Machine) -> None:
    m.stack.append(m.memo[m.number(4)])


def _dup(m: _Machine) -> None:
    m.stack.append(m.stack[-1])


def _global(m: _Machine) -> None:
    m.stack.append(_name(m, m.line(), m.line()))


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise m.damaged("a name that is no text")
    m.stack.append(_name(m, module, name))


def _name(m: _Machine, module: str, name: str) -> Name:
    m.spend(4)
    module = "builtins" if module == "__builtin__" else module
    full = f"{module}.{name}"
    if len(full) > MAX_NAME or not full.isprintable():
        raise m.damaged("a name that is none")
    if module.partition(".")[0] in RUNS_CODE or module in RUNS_CODE or full in RUNS_CODE:
        raise PlanError(
            "the file asks to run code",
            file=m.file,
            found=full,
            try_="nothing of it was run; do not load this file with torch or pickle either",
        )
    return Name(full)


def _reduce(m: _Machine) -> None:
    args = m.stack.pop()
    m.stack[-1] = _call(m, m.stack[-1], args)


def _newobj(m: _Machine) -> None:
    _reduce(m)


def _newobj_ex(m: _Machine) -> None:
    m.stack.pop()
    _reduce(m)


def _call(m: _Machine, name: object, args: object) -> object:
    if not isinstance(name, Name) or not isinstance(args, tuple):
        raise m.damaged("a call of something that is no name")
    m.spend(len(args))
    if name not in TABLES:
        return Call(name, list(args))
    first = args[0] if args else ()
    if not isinstance(first, list):  # nothing, or the function that makes a defaultdict's values
        return Table()
    m.spend(len(first))
    if isinstance(first, Table):
        return Table(first)
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in first):
        raise m.damaged("a table of something that is no pair")
    return Table(item for pair in first for item in pair)


def _build(m: _Machine) -> None:
    state = m.stack.pop()
    if isinstance(m.stack[-1], Call):
        m.stack[-1].parts.append(state)


def _outside(m: _Machine) -> None:
    m.stack[-1] = Outside(m.stack[-1])


_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: _proto, 0x95: _frame, ord("("): _mark, ord("0"): _pop, ord("1"): _pop_mark, ord("2"): _dup,
    ord("N"): _push(None), 0x88: _push(True), 0x89: _push(False),
    ord("J"): _integer(4, True), ord("K"): _byte, ord("M"): _integer(2), 0x8A: _long(1), 0x8B: _long(4), ord("G"): _float,
    ord("T"): _bytes(4), ord("U"): _bytes(1), ord("B"): _bytes(4), ord("C"): _bytes(1), 0x8E: _bytes(8), 0x96: _bytes(8),
    ord("X"): _text(4), 0x8C: _text(1), 0x8D: _text(8),
    ord(")"): _push(()), ord("t"): _tuple_of_all, 0x85: _tuple(1), 0x86: _tuple(2), 0x87: _tuple(3),
    ord("]"): _new(list), ord("l"): _list_of_all, ord("a"): _append, ord("e"): _appends,
    ord("}"): _new(Table), ord("d"): _table, ord("s"): _set, ord("u"): _sets,
    0x8F: _new(list), 0x90: _appends, 0x91: _list_of_all,
    ord("q"): _put, ord("r"): _long_put, 0x94: _memoize, ord("h"): _get, ord("j"): _long_get,
    ord("c"): _global, 0x93: _stack_global, ord("R"): _reduce, 0x81: _newobj, 0x92: _newobj_ex, ord("b"): _build, ord("Q"): _outside,
}  # fmt: skip
