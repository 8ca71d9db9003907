"""Explain a layout, or what reading rows of one layout as another does to every part and head. Data; renderers draw it.

    explain(layout, **sizes)   which rows belong to which part and head
    explain(a, b, **sizes)     what each head receives when rows laid out as `a` are read as `b`

`print(picture)` draws it, `picture.to_dict()` is its content, `picture.blocks` what renderers draw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from . import render_html, render_text, rowmap
from .catalog import USUAL
from .columns import Labels, labels, name_of, strip
from .drawing import GAP, Block, Cell, Code, Facts, Note, Table
from .errors import IncompatibleError, SizeError
from .layout import Axis, Layout, count, equation, with_brackets
from .render_code import convert_lines, part_line, read_lines, variables
from .sizes import Sizes, bind
from .words import order, pairing, span

MAX_ROWS, MAX_HEADS = 1 << 21, 1 << 12
LINES = 12
"""A table has about as many lines; more are left out in the middle."""


@dataclass(frozen=True)
class Source:
    """`rows` of the `of` rows of each of the heads `first` to `last` of one part; both None for a part without heads."""

    part: str
    first: int | None
    last: int | None
    rows: int
    of: int

    def __str__(self) -> str:
        if self.first is None:
            return f"{_rows(self.rows)} of {self.part}"
        if self.first == self.last:
            return (
                f"{self.part} of head {self.first}" if self.rows == self.of else f"{_rows(self.rows)} of head {self.first} of {self.part}"
            )
        return f"{_rows(self.rows)} of each of heads {self.first}-{self.last} of {self.part}"


@dataclass(frozen=True)
class Received:
    """What one head is given: `right` of its `rows` are its own in their place; `own`: all are its own, in whatever order.

    `head` is None for a part without heads. `ordered`: the dims of what it is given count up from 0, as they should.
    """

    part: str
    head: int | None
    rows: int
    right: int
    own: bool
    ordered: bool
    sources: tuple[Source, ...]

    def __str__(self) -> str:
        if self.right == self.rows:
            return "its own rows"
        if self.own:
            return "its own rows, in another order"
        if len(self.sources) == 1:
            one = self.sources[0]
            if one.rows < one.of or one.first != one.last:
                return str(one)
            who = f"all of {one.part}" if one.first is None else f"{one.part} of the same head" if one.first == self.head else str(one)
            return who + ("" if self.ordered else ", in another order")
        more = f" and {len(self.sources) - 3} more" if len(self.sources) > 3 else ""
        return ", ".join(map(str, self.sources[:3])) + more


@dataclass(frozen=True)
class Reading:
    """How far reading rows as `read_as` is right; `wrong` of them are read as something else.

    `verdict`: "same" every row is right; "order" every head has its own rows, in a wrong order; "heads" every part has its own
    rows, in wrong heads; "parts" some part has rows of another; "labels" the layouts do not name the same rows; "size" they differ
    in size, so that there is nothing to read and `received` is empty.
    """

    read_as: Layout
    verdict: str
    wrong: int
    received: tuple[Received, ...]


@dataclass(frozen=True)
class Picture:
    """What `explain` returns. `code` holds PyTorch lines by what they do; `reading` is None for a single layout."""

    layout: Layout
    sizes: Sizes
    rows: int
    reading: Reading | None
    code: dict[str, tuple[str, ...]]
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        return render_text.text(self)

    def _repr_html_(self) -> str:
        return render_html.html(self)

    def to_dict(self) -> dict[str, object]:
        """Plain data for `--json`. A row of a part is `start` plus the sum of index * stride over its axes."""
        out: dict[str, object] = {"layout": str(self.layout), "sizes": dict(self.sizes), "rows": self.rows, "order": order(self.layout)}
        out["parts"] = [
            {"names": list(part.path.names), "zero": part.path.zero, "heads": part.shape[0], "dims": part.shape[1],
             "start": part.start, "axes": [digit._asdict() for digit in part.digits]}
            for part in rowmap.parts(self.layout, self.sizes)
        ]  # fmt: skip
        if self.reading is not None:
            out |= {"read_as": str(self.reading.read_as), "verdict": self.reading.verdict, "wrong": self.reading.wrong}
            out["received"] = [{**asdict(one), "sources": [asdict(source) for source in one.sources]} for one in self.reading.received]
        return out | {"code": {name: list(lines) for name, lines in self.code.items()}}


def explain(layout: Layout | str, read_as: Layout | str | None = None, *, rows: int | None = None, **sizes: int) -> Picture:
    """The picture of a layout; or of what every part and head receives when rows laid out as `layout` are read as `read_as`.

    Args: sizes: any that determine all axes, as in `bind`; with `rows` one may be left out.
    Raises SizeError: sizes are missing or wrong, or the two layouts differ in rows and do not convert; IncompatibleError: parts
    that are one tensor in `read_as` and two in `layout`, where the rows differ too.

    >>> reading = explain("h (q|k|v) d", "(q|k|v) h d", h=4, d=32).reading
    >>> reading.verdict, reading.wrong, [(r.part, r.head) for r in reading.received if r.right == r.rows]
    ('parts', 320, [('q', 0), ('v', 3)])
    """
    a, b = Layout(layout), None if read_as is None else Layout(read_as)
    both = (a,) if b is None else (a, b)
    bound = bind(*both, rows=rows, **sizes)
    for one in both:
        total, heads = count(one.factors, bound), max(math.prod(bound[axis] for axis in path.heads) for path in one.paths)
        if total > MAX_ROWS or heads > MAX_HEADS:
            raise SizeError("too many rows to draw", layout=f"{one} with {bound.of(one)}", found=f"{total} rows, {heads} heads",
                            expected=f"at most {MAX_ROWS} rows, {MAX_HEADS} heads")  # fmt: skip
    return _one(a, bound) if b is None else _two(a, b, bound)


# -- one layout ------------------------------------------------------------------------------------------------------


def _one(layout: Layout, sizes: Sizes) -> Picture:
    parts, total, repeats = rowmap.parts(layout, sizes), count(layout.factors, sizes), _repeats(layout, sizes)
    code = {"read": read_lines(layout, sizes)}
    for name in layout.parts:
        code[f"weight {name}".rstrip()] = (part_line(layout, sizes, name),)
        code[f"bias {name}".rstrip()] = (part_line(layout, sizes, name, "bias", bias=True),)
    facts = [
        ("layout", str(layout)),
        ("used by", _users(layout)),
        ("order", order(layout)),
        ("note", f"brackets make axes common to all parts: {meant}" if (meant := with_brackets(layout)) else ""),
        ("sizes", f"{sizes.of(layout)}   {equation(layout.factors, sizes)} = {total} rows"),
        ("repeats", f"{repeats} blocks of {total // repeats} rows" if repeats > 1 else ""),
    ]
    names = variables(layout)
    takes = [f"{names[name]}_{what} = {code[f'{what} {name}'.rstrip()][0]}" for what in ("weight", "bias") for name in layout.parts[:3]]
    blocks: tuple[Block, ...] = (
        Facts(tuple((name, value) for name, value in facts if value)),
        strip([("rows", labels(layout, sizes))], repeats),
        _where(parts),
        *(Note(text) for text in _remarks(parts)),
        Code("read every part, as [..., heads, dims]", code["read"]),
        Code("take parts out of a weight [out, in] and a bias", tuple(takes)),
    )
    return Picture(layout, sizes, total, None, code, blocks)


def _users(layout: Layout) -> str:
    return dict(USUAL).get(str(layout), "")


def _repeats(layout: Layout, sizes: Sizes) -> int:
    """How often the first sum stands in the rows, one after the other."""
    lead = tuple(itertools.takewhile(lambda factor: isinstance(factor, Axis), layout.factors))
    return count(lead, sizes) if len(lead) < len(layout.factors) else 1


def _where(parts: Sequence[rowmap.Part]) -> Table:
    """Every part: heads x dims, the row number as a formula, and the rows of its first two heads and its last."""
    grids = [part.rows() for part in parts]
    many = max(len(grid) for grid in grids)
    compact = all(len(grid[0]) == 1 or grid[0, -1] - grid[0, 0] == len(grid[0]) - 1 for grid in grids)
    heads = [0, *([1] if many > 2 and compact else []), *([-1] if many > 1 else [])]
    rows = []
    for part, grid in zip(parts, grids, strict=True):
        shown = [span(grid[head].tolist()) if head < len(grid) and (head == 0 or len(grid) > 1) else "" for head in heads]
        rows.append((Cell(name_of(part), name_of(part)), Cell(f"{len(grid)} x {grid.shape[1]}"), Cell(_formula(part)), *map(Cell, shown)))
    titles = ["rows"] if many == 1 else ["last head" if head < 0 else f"head {head}" for head in heads]
    return Table("where each part lies", ("part", "heads x dims", "row number", *titles), tuple(rows))


def _formula(part: rowmap.Part) -> str:
    """`96*h + 32 + d`: the row of (head, dim) in the names of the axes."""
    steps = [f"{digit.stride}*{digit.axis}" if digit.stride > 1 else digit.axis for digit in part.digits if digit.size > 1]
    start = [str(part.start)] if part.start or not steps else []
    near = len(steps) - bool(steps and "*" not in steps[-1])
    return " + ".join([*steps[:near], *start, *steps[near:]])


def _remarks(parts: Sequence[rowmap.Part]) -> Iterator[str]:
    turned: dict[str, list[str]] = {}
    for part in parts:
        if how := pairing(part):
            turned.setdefault(f"dim i and dim i + {_pairs(part)}, {how}", []).append(name_of(part))
    for how, names in turned.items():
        yield f"A rotary pair of {', '.join(names)} is {how}."
    for part in parts:
        if len(part.path.names) > 1:
            yield f"{' and '.join(part.path.names)} are one tensor: the same rows in {len(part.path.names)} roles."
        if part.path.zero:
            yield f"the rows of {part.path.names[0]} are there and hold zero."


def _pairs(part: rowmap.Part) -> int:
    return next(digit.size for digit in part.digits if digit.axis == "p")


# -- one layout read as another --------------------------------------------------------------------------------------


def _two(a: Layout, b: Layout, sizes: Sizes) -> Picture:
    total, other = count(a.factors, sizes), count(b.factors, sizes)
    code, why_not = {"read": read_lines(a, sizes)} | ({"misread": read_lines(b, sizes)} if total == other else {}), None
    try:
        code |= {"weight": convert_lines(a, b, sizes), "bias": convert_lines(a, b, sizes, "bias", bias=True)}
    except IncompatibleError as error:
        why_not = error
    if total != other and why_not:
        if "found" not in why_not.fields:
            raise why_not
        meant = with_brackets(a) or with_brackets(b)
        raise SizeError(
            "the two layouts have different rows: nothing can be read as both, or converted",
            layout=f"{a}   -> {equation(a.factors, sizes)} = {total} rows\n{b}   -> {equation(b.factors, sizes)} = {other} rows",
            found=f"only in the first: {why_not.fields['found']}",
            expected=f"only in the second: {why_not.fields['expected']}",
            try_=f"did you mean {meant}?" if meant else "sizes that give both the same parts, heads and dims",
        )
    facts = Facts((
        ("rows are", str(a)), ("", _about(a)), ("read as", str(b)), ("", _about(b)), ("sizes", f"{sizes.of(a, b)}   {total} rows"),
    ))  # fmt: skip
    if total != other:
        note = Note(f"{a} has {total} rows and {b} has {other}: no tensor can be read as both, but one can be made of the other.", "bad")
        lines = (Code(f"this reads {a}", code["read"]), Code(f"this makes {b} of it", (*code["weight"], *code["bias"])))
        return Picture(a, sizes, total, Reading(b, "size", 0, ()), code, (facts, note, *lines))
    given, wanted = labels(a, sizes), labels(b, sizes)
    reading, wrong = _reading(b, given, wanted, why_not is not None)
    blocks: list[Block] = [facts, strip([("hold", given), ("read as", wanted)], 1, wrong), _verdict(reading, total)]
    if reading.verdict != "same":
        blocks += [Note(text) for text in _why(a, b, reading, given, wanted, why_not)]
        blocks.append(_receives(reading))
        if reading.verdict in ("parts", "labels") and _kind(reading) == "head":
            blocks.append(_mixtures(reading))
    return Picture(a, sizes, total, reading, code, (*blocks, *_mend(a, b, code)))


def _about(layout: Layout) -> str:
    users = _users(layout)
    return order(layout) + (f"   ({users})" if users else "")


def _reading(b: Layout, given: Labels, wanted: Labels, foreign: bool) -> tuple[Reading, np.ndarray]:
    """What every head of `b` is given, and which rows are wrong."""
    agree = np.array([[set(to.path.names) <= set(of.path.names) for of in given.parts] for to in wanted.parts])
    right = agree[wanted.part, given.part] & (given.head == wanted.head) & (given.dim == wanted.dim)
    received, most = [], int(given.head.max()) + 1
    about = [(name_of(part), bool(part.path.heads), part.shape[1]) for part in given.parts]
    for i, part in enumerate(wanted.parts):
        for head, rows in enumerate(part.rows()):
            keys, counts = np.unique(given.part[rows] * most + given.head[rows], return_counts=True)
            from_heads = [divmod(key, most) for key in keys.tolist()]
            own = len(from_heads) == 1 and bool(agree[i, from_heads[0][0]]) and from_heads[0][1] == head
            ordered = bool((given.dim[rows] == np.arange(len(rows))).all())
            sources = _sources(from_heads, counts.tolist(), about)
            number = head if part.path.heads else None
            received.append(Received(name_of(part), number, len(rows), int(right[rows].sum()), own, ordered, sources))
    wrong = int((~right).sum())
    if not wrong:
        verdict = "same"
    elif foreign:
        verdict = "labels"
    elif all(one.own for one in received):
        verdict = "order"
    elif agree[wanted.part, given.part].all():
        verdict = "heads"
    else:
        verdict = "parts"
    return Reading(b, verdict, wrong, tuple(received)), ~right


def _sources(keys: list[tuple[int, int]], counts: list[int], about: Sequence[tuple[str, bool, int]]) -> tuple[Source, ...]:
    """Rows of (part, head) pairs, heads that give alike in one; `about` every part: its name, whether it has heads, its dims."""
    out: list[Source] = []
    for (part, head), rows in zip(keys, counts, strict=True):
        name, has_heads, dims = about[part]
        first = number = head if has_heads else None
        if out and out[-1].part == name and out[-1].rows == rows and out[-1].last == head - 1:
            first = out.pop().first
        out.append(Source(name, first, number, rows, dims))
    return tuple(out)


def _rows(number: int) -> str:
    return f"{number} row{'s' * (number > 1)}"


def _verdict(reading: Reading, total: int) -> Note:
    if reading.verdict == "same":
        return Note(f"All {total} rows are read as what they are: at these sizes the two layouts say the same.", "good")
    heads = {part: list(group) for part, group in itertools.groupby(reading.received, lambda one: one.part)}
    right = []
    for part, group in heads.items():
        good = [one.head for one in group if one.right == one.rows]
        if good:
            right.append(
                part if good == [None] else f"head{'s' * (len(good) > 1)} {span([head for head in good if head is not None])} of {part}"
            )
    left = sum(one.right < one.rows for one in reading.received)
    rest = f"Right: {', '.join(right)}; {left} other{'s are' if left > 1 else ' is'} not." if right else f"No {_kind(reading)} is right."
    return Note(f"{reading.wrong} of {total} rows are read as something else. {rest}", "bad")


def _why(a: Layout, b: Layout, reading: Reading, given: Labels, wanted: Labels, why_not: IncompatibleError | None) -> Iterator[str]:
    wrong = [one for one in reading.received if one.right < one.rows and not one.own]
    told = {str(one): one for one in reversed(wrong[:2])}
    so = ("; " if any("," in text for text in told) else " and ").join(
        f"{_title(one)} receives {text}" for text, one in reversed(told.items())
    )
    yield f"Why: the rows go {order(a)}. They are read as if they went {order(b)}." + (f" So {so}." if so else "")
    if reading.verdict == "heads":
        yield (
            "Every part receives exactly its own set of rows, and heads of it the wrong ones. Shapes, sums, norms, sorted values and "
            "any other test that ignores order (a multiset) pass; attention, which works head by head, goes wrong."
        )
    if reading.verdict == "order":
        yield "Every head receives exactly its own rows, in another order. Shapes, sums, norms and sorted values of each head pass."
    here, there = ({name_of(part): pairing(part) for part in table.parts} for table in (given, wanted))
    turned = [name for name, how in there.items() if how and here.get(name) and here[name] != how]
    if turned and reading.verdict != "labels":
        yield f"The rows of a rotary pair of {', '.join(turned)} lie {here[turned[0]]} and are taken {there[turned[0]]}."
        if reading.verdict == "order" and {"q", "k"} <= set(turned):
            yield "q and k are shuffled alike, so their scores agree until the rotary embedding turns the wrong pairs."
    if why_not is not None:
        only = [f"Only in {one}: {why_not.fields[field]}." for one, field in ((a, "found"), (b, "expected")) if field in why_not.fields]
        yield f"There is no conversion: {why_not.what}. {' '.join(only)}".rstrip()


def _title(one: Received) -> str:
    return one.part if one.head is None else f"head {one.head} of {one.part}"


def _kind(reading: Reading) -> str:
    return "part" if all(one.head is None for one in reading.received) else "head"


def _receives(reading: Reading) -> Table:
    """A line for every head, neighbours that fare alike in one, the middle of long lists left out."""
    rows: list[tuple[Cell, ...]] = []
    by_part = [(part, list(group)) for part, group in itertools.groupby(reading.received, lambda one: one.part)]
    limit = max(4, LINES // len(by_part) + 1)
    for part, heads in by_part:
        groups = [list(group) for _, group in itertools.groupby(heads, str)]
        for group in groups if len(groups) <= limit else [*groups[: limit - 2], [], groups[-1]]:
            if not group:
                rows.append((Cell(f"{part} {GAP}", part), Cell(GAP)))
                continue
            one, numbers = group[0], [one.head for one in group if one.head is not None]
            text = Cell(str(one), one.sources[0].part if len(one.sources) == 1 else "", one.right < one.rows)
            rows.append((Cell(f"{part} {span(numbers)}" if numbers else part, part), text))
    return Table(f"what each {_kind(reading)} receives", (_kind(reading), "receives"), tuple(rows))


def _mixtures(reading: Reading) -> Table:
    rows = []
    for part, group in itertools.groupby(reading.received, lambda one: one.part):
        mix: dict[str, int] = {}
        for source in (source for one in group for source in one.sources):
            mix[source.part] = mix.get(source.part, 0) + source.rows * ((source.last or 0) - (source.first or 0) + 1)
        text = ", ".join(f"{_rows(rows_of)} of {name}" for name, rows_of in mix.items())
        rows.append((Cell(part, part), Cell(text, "", set(mix) != {part})))
    return Table("what each part receives", ("part", "receives"), tuple(rows))


def _mend(a: Layout, b: Layout, code: dict[str, tuple[str, ...]]) -> Iterator[Block]:
    moves = code.get("weight", ())
    if moves or "weight" not in code:
        yield Code(f"this reads them as {b}: wrong here", code["misread"])
    yield Code(f"this reads them as {a}: right", code["read"])
    if moves:
        yield Code(f"or move the rows once; then reading them as {b} is right", (*moves, *code["bias"]))
