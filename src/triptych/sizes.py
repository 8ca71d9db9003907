"""Binds sizes to a layout: completes them, checks divisibility, solves the one unknown from the row count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

from . import axes
from .errors import SizeError
from .layout import Layout, count, equation, with_brackets

MAX_DIVISOR_SEARCH = 1 << 20


class Sizes(Mapping[str, int]):
    """Sizes of axes under their chief names. Frozen, hashable; prints as `h=32 d=128`."""

    __slots__ = ("_hash", "_sizes")

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = dict(sizes)
        self._hash = hash(frozenset(self._sizes.items()))

    def __getitem__(self, name: str) -> int:
        return self._sizes[axes.ALIASES.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self._sizes == (other._sizes if isinstance(other, Sizes) else other)

    def __repr__(self) -> str:
        return f"Sizes({self._sizes})"

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self._sizes.items())

    def of(self, *layouts: Layout) -> str:
        """Those sizes that the layouts use, in the order in which they use them.

        >>> bind("g (q r|k|v) d", h=32, g=8, d=128).of(Layout("g (q r|k|v) d"))
        'g=8 r=4 d=128'
        """
        used = dict.fromkeys(axis for layout in layouts for axis in layout.axes)
        return " ".join(f"{axis}={self[axis]}" for axis in used)


def bind(*layouts: Layout | str, rows: int | None = None, **sizes: int) -> Sizes:
    """Sizes for every axis of the layouts, from any subset that determines them; the same sizes for all layouts.

    Args: rows: how many rows the packed axis has, which the first layout must fill; with it one axis may stay unknown.
    Raises SizeError: an axis nobody knows, sizes that contradict each other, do not divide or do not fill the rows.

    >>> str(bind("h (q|k|v) d", rows=384, h=4))
    'h=4 d=32'
    """
    try:
        key = tuple(sizes.items())
        return _bind(tuple(Layout(layout) if isinstance(layout, str) else layout for layout in layouts), rows, key)
    except TypeError:  # an unhashable size; say so properly
        axes.checked(sizes, [a for layout in layouts for a in Layout(layout).axes])
        raise


@lru_cache(maxsize=4096, typed=True)
def _bind(layouts: tuple[Layout, ...], rows: int | None, given: tuple[tuple[str, int], ...]) -> Sizes:
    used = list(dict.fromkeys(axis for layout in layouts for axis in layout.axes))
    sizes = axes.checked(dict(given), used)
    n_is_free = any(layout.n_is_free for layout in layouts)
    if rows is not None and rows < 1:
        raise SizeError("a packed axis needs at least one row", layout=" and ".join(map(str, layouts)), found=f"{rows} rows")
    known = axes.resolve(sizes, used, n_is_free)
    if _one_q_per_kv(layouts):
        trial = axes.resolve({**sizes, "r": known.get("r", 1)}, used, n_is_free)
        if len(_missing(trial, used)) < len(_missing(known, used)):
            sizes, known = {**sizes, "r": trial["r"]}, trial
    if rows is not None and _missing(known, used):
        known = _solve(layouts, rows, sizes, used, n_is_free)
    missing = _missing(known, used)
    if missing:
        wanted = _suggest(missing, {"r": 1, **known} if _one_q_per_kv(layouts) else known, used, n_is_free)
        raise SizeError(
            "sizes are missing",
            layout=" and ".join(dict.fromkeys(map(str, layouts))),
            found=", ".join(f"{k}={v}" for k, v in sizes.items()) or "none",
            expected="sizes for " + ", ".join(used),
            try_=f"give {' and '.join(wanted)}{'' if rows is not None else ', or all but one of them and rows='}; "
            f"on the command line {' '.join(f'-s {name}=NUMBER' for name in wanted)}",
        )
    if rows is not None and count(layouts[0].factors, known) != rows:
        raise does_not_fit(layouts[0], rows, Sizes(known))
    order = [*dict.fromkeys(axes.ALIASES.get(a, a) for a in [*dict(given), *used]), *known]
    return Sizes({name: known[name] for name in order if name in known})


def _one_q_per_kv(layouts: tuple[Layout, ...]) -> bool:
    """Whether the texts give q and k the same head axes, so that r = 1 and h = g = (t n)."""
    used = {axis for layout in layouts for axis in layout.axes}
    return "q" in layouts[0].parts and "r" not in used and not {"h", "g"} <= used


def _missing(known: Mapping[str, int], used: list[str]) -> list[str]:
    return [axis for axis in used if axes.ALIASES.get(axis, axis) not in known]


def _suggest(missing: list[str], known: Mapping[str, int], used: list[str], n_is_free: bool) -> list[str]:
    """Those of the missing sizes that must be given: r follows from h and g, n from g and t."""
    for name in reversed(missing):
        rest = [other for other in missing if other != name]
        try:
            trial = axes.resolve({**known, **{axes.ALIASES.get(other, other): 1 for other in rest}}, used, n_is_free)
        except SizeError:  # with so many of them given there is nothing to solve
            continue
        if not _missing(trial, [name]):
            missing = rest
    return missing


def _solve(layouts: tuple[Layout, ...], rows: int, sizes: dict[str, int], used: list[str], n_is_free: bool) -> dict[str, int]:
    """The one unknown that fills the rows.

    Row counts are linear in every axis, so two evaluations find it; an axis that must divide a known one
    (g when only h is known) is searched among the divisors.
    """
    names = dict.fromkeys([*(axes.ALIASES.get(a, a) for a in used), *axes.PRODUCTS, *(a for pair in axes.PRODUCTS.values() for a in pair)])
    base = axes.resolve(sizes, used, n_is_free)
    for name in names:
        if name in base:
            continue
        try:
            trial = axes.resolve({**sizes, name: 1}, used, n_is_free)
        except SizeError:
            continue
        if _missing(trial, used):
            continue
        whole = next((w for w, pair in axes.PRODUCTS.items() if name in pair and w in base and not set(pair) & set(base)), None)
        values = _divisors(base[whole]) if whole else [_linear(layouts[0], rows, sizes, used, n_is_free, name)]
        fits = []
        for value in values:
            if value < 1:
                continue
            try:
                full = axes.resolve({**sizes, name: value}, used, n_is_free)
            except SizeError:
                continue
            if count(layouts[0].factors, full) == rows:
                fits.append(full)
        if len(fits) == 1:
            return fits[0]
        listed = ", ".join(f"{name}={fit[name]}" for fit in fits)
        raise SizeError(
            f"{'no' if not fits else 'more than one'} size of {name} gives {rows} rows",
            layout=" and ".join(map(str, layouts)) + (f" with {Sizes(sizes)}" if sizes else ""),
            found=listed or None,
            equation=None if fits else _hint(layouts[0], rows, trial, name),
            try_=f"did you mean {meant}?" if (meant := with_brackets(layouts[0])) else None,
        )
    return base


def _linear(layout: Layout, rows: int, sizes: dict[str, int], used: list[str], n_is_free: bool, name: str) -> int:
    one, two = (count(layout.factors, axes.resolve({**sizes, name: v}, used, n_is_free)) for v in (1, 2))
    value, rest = divmod(rows - one, two - one) if two > one else (0, 1)
    return 0 if rest else value + 1


def _divisors(number: int) -> list[int]:
    if number > MAX_DIVISOR_SEARCH**2:
        raise SizeError("a size too large to search its divisors", found=str(number))
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def _hint(layout: Layout, rows: int, trial: Mapping[str, int], name: str) -> str:
    unit = count(layout.factors, trial)
    return f"{name}=1 -> {equation(layout.factors, trial)} = {unit} rows, and {rows} = {unit} * {rows // unit} + {rows % unit}"


def does_not_fit(layout: Layout, rows: int, sizes: Sizes, tensor: str | None = None, shape: tuple[int, ...] | None = None) -> SizeError:
    """The error for an axis of `rows` rows that `layout` at `sizes` does not fill; names the size that would fit, if one does."""
    need = count(layout.factors, sizes)
    ratio = f" = {rows // need} * {need}" if rows % need == 0 and rows > need else ""
    fits = [f"{name}={value}" for name, value in _fitting(layout, rows, sizes)]
    meant = with_brackets(layout)
    return SizeError(
        "rows do not fill the layout",
        tensor=tensor,
        layout=f"{layout} with {sizes.of(layout)}   -> {equation(layout.factors, sizes)} = {need} rows",
        found=(f"{tuple(shape)}   -> " if shape else "") + f"{rows} rows{ratio}",
        try_=f"did you mean {meant}?"
        if meant
        else (f"{' or '.join(fits)} fits this layout; " if fits else "") + "`triptych detect FILE` ranks all that fit",
    )


def _fitting(layout: Layout, rows: int, sizes: Sizes) -> Iterator[tuple[str, int]]:
    """Other sizes of a single used axis that would fill the rows."""
    used = list(layout.axes)
    for axis in dict.fromkeys(axes.ALIASES.get(a, a) for a in reversed(used)):
        if axis == "c":
            continue
        others = {axes.ALIASES.get(a, a): sizes[a] for a in used if axes.ALIASES.get(a, a) != axis}
        try:
            value = _linear(layout, rows, others, used, layout.n_is_free, axis)
            if value >= 1 and count(layout.factors, axes.resolve({**others, axis: value}, used, layout.n_is_free)) == rows:
                yield axis, value
        except (SizeError, KeyError):
            continue
