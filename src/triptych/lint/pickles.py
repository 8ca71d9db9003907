r"""The names that a pickle asks Python to import, listed without importing any. Nothing is built, nothing is called.

Where `formats.unpickle` refuses a file, this goes on to its end, so that all names come to light; old protocols are read too.

>>> asked(b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.")
('os.system',)
"""

from __future__ import annotations

import os
import pickletools
import re
from collections.abc import Iterator
from pathlib import Path

from .. import formats
from ..formats.unpickle import RUNS_CODE
from ..formats.zip_records import content, read_records

ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_PICKLE, MAX_STEPS, MAX_PICKLES = 1 << 25, 1 << 20, 8
COMPUTED, ENDLESS = "a name that the pickle computes", "more than this program reads"
TENSORS = re.compile(
    r"collections\.(OrderedDict|defaultdict|Counter)|builtins\.(dict|list|set|int|float|str|tuple|bool|bytearray|complex|slice)"
    r"|torch\.(\w*Storage|Size|device|dtype|Tensor|Generator|serialization\._get_layout|[a-z]+\d+\w*|half|float|double|int|long|short|bool)"
    r"|torch\.(storage\.\w*Storage|_utils\._rebuild_\w+|_tensor\._rebuild\w+|nn\.parameter\.\w*Parameter|_C\._\w*StorageBase)"
    r"|_codecs\.encode|numpy\.(dtype|ndarray|dtypes\.\w+|_?core\.multiarray\.(_reconstruct|scalar))"
)
"""What a pickle of tensors, numbers and texts needs."""
LEADS_TO_CODE = RUNS_CODE | {
    "_pickle", "_thread", "asyncio", "bdb", "cProfile", "cloudpickle", "concurrent", "dill", "doctest", "functools", "http",
    "inspect", "joblib", "linecache", "multiprocessing", "numpy.testing", "operator", "pickle", "pkgutil", "profile", "pydoc",
    "signal", "site", "smtplib", "ssl", "tempfile", "threading", "timeit", "trace", "types", "urllib", "zipimport",
    "torch.storage._load_from_bytes", "builtins.delattr", "builtins.getattr", "builtins.globals", "builtins.locals", "builtins.map",
    "builtins.setattr", "builtins.vars", "builtins.apply",
}  # fmt: skip
"""Modules and functions that run code, or fetch what does. No such list is complete: what is on neither list is a warning."""


def names_in(path: Path) -> tuple[str, ...]:
    """The names that a file's pickles ask for, each once; none for a file that holds no pickle. Raises FormatError (damaged archives)."""
    found: dict[str, None] = {}
    for raw in _pickles(path):
        found.update(dict.fromkeys(asked(raw)))
    return tuple(found)


def is_for_tensors(name: str) -> bool:
    """Whether tensors, numbers and texts need it.

    >>> is_for_tensors("torch._utils._rebuild_tensor_v2"), is_for_tensors("argparse.Namespace")
    (True, False)
    """
    return TENSORS.fullmatch(name) is not None


def runs_code(name: str) -> bool:
    """Whether it runs code or fetches what does, as far as is known.

    >>> runs_code("os.system"), runs_code("builtins.getattr"), runs_code("argparse.Namespace")
    (True, True, False)
    """
    words = name.split(".")
    return name in (COMPUTED, ENDLESS) or any(".".join(words[:i]) in LEADS_TO_CODE for i in range(1, len(words) + 1))


def _pickles(path: Path) -> Iterator[bytes]:
    fd = formats.open_file(path)
    try:
        size = os.fstat(fd).st_size
        first = os.pread(fd, 4, 0)
        if first == b"PK\3\4":
            records, end = read_records(fd, size, path.name)
            for name, record in records.items():
                if name.endswith(b".pkl"):
                    yield content(fd, record, end, path.name, MAX_PICKLE)
        elif first[:1] == b"\x80" or path.name.endswith((".pkl", ".pickle")):
            yield os.pread(fd, MAX_PICKLE, 0)
    finally:
        os.close(fd)


def asked(raw: bytes) -> tuple[str, ...]:
    """The names, in their order, of a pickle or several in a row, up to the first byte that is none of a pickle."""
    found: dict[str, None] = {}
    at = 0
    for _ in range(MAX_PICKLES):
        try:
            for name, stop in _imports(raw[at:]):
                if name:
                    found[name] = None
                length = stop
        except (ValueError, KeyError, IndexError, UnicodeDecodeError, OverflowError, MemoryError):
            break
        at += length
        if at >= len(raw):
            break
    return tuple(found)


def _imports(raw: bytes) -> Iterator[tuple[str, int]]:
    """(name or nothing, bytes read) for every instruction. The last texts that were pushed stand for the stack."""
    texts: list[str | None] = []
    memo: dict[int, str | None] = {}
    for number, (code, argument, at) in enumerate(pickletools.genops(raw)):
        word, at = code.name, at or 0
        if number > MAX_STEPS:
            yield ENDLESS, at
            raise ValueError
        if word in ("GLOBAL", "INST"):
            yield _joined(*str(argument).split(" ", 1)), at
        elif word == "STACK_GLOBAL":
            module, name = (*texts[-2:], None, None)[:2]
            yield (_joined(module, name) if module is not None and name is not None else COMPUTED), at
        elif word in ("EXT1", "EXT2", "EXT4"):
            yield COMPUTED, at
        if word == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else None
        elif "PUT" in word:
            memo[int(str(argument))] = texts[-1] if texts else None
        elif "GET" in word:
            texts.append(memo.get(int(str(argument))))
        elif "UNICODE" in word or "STRING" in word:
            texts.append(argument if isinstance(argument, str) else None)
        elif word not in ("PROTO", "FRAME", "MARK"):
            texts.append(None)
        del texts[:-4]
        yield "", at + 1


def _joined(module: str, name: str = "") -> str:
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    return f"{module}.{name}"[:200]
