"""The legend: axis names with a meaning, and the arithmetic that ties their sizes together.

    h = (g r)   query heads        g = (t n)   kv heads            r   query heads per kv head
    t           tensor-parallel blocks (also spelled m)            n   kv heads per block
    d = (c p)   head dim           c   rotary component, 2         p   rotary pair

All other names are free.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Collection, Iterable, Mapping

from .errors import SizeError

PRODUCTS: dict[str, tuple[str, str]] = {"h": ("g", "r"), "g": ("t", "n"), "d": ("c", "p")}
ALIASES = {"m": "t"}
ATOMS = {"h": ("t", "n", "r"), "g": ("t", "n"), "t": ("t",), "m": ("t",), "n": ("n",), "r": ("r",)}
HEAD_ORDER = ("t", "n", "r")
DIM_ATOMS = {"d": ("c", "p"), "c": ("c",), "p": ("p",)}
RESERVED = frozenset(ATOMS) | frozenset(DIM_ATOMS)
FIRST_PARTS = ("q", "k", "v", "gate", "up")
"""Parts are handed out in this order, whatever their order in the rows; other parts follow in order of appearance."""


def clash(axes: Iterable[str]) -> tuple[str, str] | None:
    """Two axes of one path that number the same thing (`h` and `g`, `d` and `c`, an axis and itself), or None.

    >>> clash(["h", "g", "d"])
    ('h', 'g')
    """
    names = list(axes)
    heads = head_axes(names)
    seen: dict[str, str] = {}
    for name in names:
        atoms = ATOMS[name] if name in heads else DIM_ATOMS.get(name, (f"free {name}",))
        for atom in atoms:
            if atom in seen:
                return seen[atom], name
            seen[atom] = name
    return None


def head_axes(axes: Iterable[str]) -> tuple[str, ...]:
    """The axes of a path that number its heads, in the order t, n, r.

    Beside `h` or `g` the head number is complete, so `n` is then a free axis: the tail of `h (rot c p|pass n)`.

    >>> head_axes(["r", "g", "d"]), head_axes(["h", "n"])
    (('g', 'r'), ('h',))
    """
    names = list(axes)
    whole = "h" in names or "g" in names
    heads = [a for a in names if a in ATOMS and not (whole and a == "n")]
    return tuple(sorted(heads, key=lambda a: HEAD_ORDER.index(ATOMS[a][0])))


def dim_axes(axes: Iterable[str]) -> tuple[str, ...]:
    """The axes of a path that number its dims: in order of appearance, except that `c` always counts before `p`.

    >>> dim_axes(["h", "p", "c"]), dim_axes(["x", "h", "dk"])
    (('c', 'p'), ('x', 'dk'))
    """
    names = list(axes)
    heads = head_axes(names)
    dims = [a for a in names if a not in heads]
    if "c" in dims and "p" in dims and dims.index("p") < dims.index("c"):
        i, j = dims.index("p"), dims.index("c")
        dims[i], dims[j] = "c", "p"
    return tuple(dims)


def checked(sizes: Mapping[str, object], used: Collection[str]) -> dict[str, int]:
    """`sizes` as positive ints under their chief names; SizeError for an axis that nobody knows or a size that is none."""
    out: dict[str, int] = {}
    for name, value in sizes.items():
        if name not in used and name not in RESERVED:
            near = difflib.get_close_matches(name, [*used, *RESERVED], 1)
            raise SizeError(
                f"unknown axis {name!r}",
                found=f"{name}={value!r}",
                expected="sizes of " + ", ".join(dict.fromkeys(used)),
                try_=f"did you mean {near[0]!r}?" if near else None,
            )
        try:
            size = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            size = 0
        if size < 1 or isinstance(value, bool):
            raise SizeError(f"the size of {name!r} must be a positive whole number", found=f"{name}={value!r}")
        chief = ALIASES.get(name, name)
        if out.setdefault(chief, size) != size:
            raise SizeError("two sizes for one axis: m is another spelling of t", found=f"{out[chief]} and {size}")
    return out


def resolve(sizes: Mapping[str, int], used: Collection[str], n_is_free: bool = False) -> dict[str, int]:
    """Add every size that follows from the given ones through h = g*r, g = t*n, d = c*p (c = 2 unless given).

    Raises SizeError with the equation when the given ones contradict each other.

    >>> resolve({"h": 32, "g": 8, "d": 128}, ["g", "r", "c", "p"])["r"]
    4
    """
    known = dict(sizes)
    if "c" in used:
        known.setdefault("c", 2)
    relations = [(w, a, b) for w, (a, b) in PRODUCTS.items() if not (n_is_free and b == "n")]
    moved = True
    while moved:
        moved = False
        for whole, a, b in relations:
            if a in known and b in known and whole not in known:
                known[whole] = known[a] * known[b]
            elif whole in known and (a in known) != (b in known):
                given, missing = (a, b) if a in known else (b, a)
                known[missing] = _quotient(whole, given, missing, known)
            else:
                continue
            moved = True
    for whole, a, b in relations:
        if whole in known and a in known and b in known and known[whole] != known[a] * known[b]:
            raise SizeError(
                f"sizes contradict each other: {whole} = {a} * {b}",
                found=f"{whole}={known[whole]}, {a}={known[a]}, {b}={known[b]}",
                equation=f"{known[a]} * {known[b]} = {known[a] * known[b]}, not {known[whole]}",
            )
    return known


def _quotient(whole: str, given: str, missing: str, known: Mapping[str, int]) -> int:
    quotient, rest = divmod(known[whole], known[given])
    if rest:
        raise SizeError(
            f"{whole} must be a multiple of {given}",
            found=f"{whole}={known[whole]}, {given}={known[given]}",
            equation=f"{whole} = {given} * {missing}, and {known[whole]} = {known[given]} * {quotient} + {rest}",
        )
    return quotient
