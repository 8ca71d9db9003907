"""What a traced run showed: tensors, conflicts, errors; as text, HTML and plain data."""

from __future__ import annotations

import html
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import catalog
from ..errors import cut, printable
from ..layout import Layout

WIDTH = 80
MAX_LINES = 14
MAX_NAMES = 40


@dataclass(frozen=True)
class TracedTensor:
    """A tensor that was bound to a name. `rows`: which row of the fused weight each element holds, over those of its axes along
    which they differ, in order; -1 for none. `layout`: under which they are all of `part` in head order, if any.
    """

    names: tuple[str, ...]
    line: int
    shape: tuple[int, ...]
    layout: Layout | None
    part: str | None
    note: str
    kind: str
    function: str
    file: str
    rows: NDArray[np.int64] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.names[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "names": list(self.names),
            "line": self.line,
            "function": self.function,
            "file": self.file,
            "kind": self.kind,
            "shape": list(self.shape),
            "layout": str(self.layout) if self.layout else None,
            "part": self.part,
            "note": self.note,
            "rows": self.rows.tolist(),
        }


@dataclass(frozen=True)
class Conflict:
    """Two tensors, by name, that are taken for the same part and hold different rows.

    `fix_a` are the lines that mend `a` when `layout_b` is right, `fix_b` those that mend `b` when `layout_a` is right; "" when the
    other side's rows are no layout. `wrong` is "a" or "b" when the true layout is known. `note_a` and `note_b` say what each holds.
    """

    a: str
    b: str
    part: str
    line_a: int
    line_b: int
    layout_a: Layout | None
    layout_b: Layout | None
    note_a: str
    note_b: str
    rows: int
    common: int
    fix_a: str
    fix_b: str
    wrong: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {key: str(plain[key]) if plain[key] else None for key in ("layout_a", "layout_b")}


@dataclass(frozen=True)
class Report:
    """What `trace` saw. `result` is what the function returned, `error` the exception that it raised instead.

    `findings` are biases that were added to rows of another number, with the line. `truth` is the layout known to be right, and
    `truth_source` who says so; `misread` names tensors that are taken for a part but hold that of another layout, `misread_fix` are the
    lines that mend them.
    """

    function: str
    file: str
    fused: str
    rows: int
    tensors: tuple[TracedTensor, ...]
    conflicts: tuple[Conflict, ...]
    findings: tuple[str, ...]
    error: Exception | None
    error_line: int | None
    result: Any = field(repr=False)
    truth: Layout | None = None
    truth_source: str = ""
    misread: tuple[str, ...] = ()
    misread_fix: str = ""

    def __str__(self) -> str:
        return printable("\n".join(line.rstrip() for line in (*self._head(), "", *self._table(), *self._verdict())))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the result and the exception are only named."""
        error = None if self.error is None else {"type": type(self.error).__name__, "text": str(self.error), "line": self.error_line}
        return {
            "function": self.function,
            "file": self.file,
            "fused": self.fused,
            "rows": self.rows,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "conflicts": [conflict.to_dict() for conflict in self.conflicts],
            "findings": list(self.findings),
            "error": error,
            "truth": str(self.truth) if self.truth else None,
            "truth_source": self.truth_source,
            "misread": list(self.misread),
            "misread_fix": self.misread_fix,
        }

    def _head(self) -> Iterator[str]:
        yield _cut(f"{self.function} ({Path(self.file).name}), {self.rows} rows of {self.fused}")
        if self.error is not None:
            first = (str(self.error).splitlines() or [""])[0]
            line = f" on line {self.error_line}" if self.error_line else ""
            yield from _wrapped(cut(f"it stopped{line}: {type(self.error).__name__}{': ' if first else ''}{first}", 4 * WIDTH))

    def _table(self) -> Iterator[str]:
        groups = [list(group) for _, group in itertools.groupby(self.tensors, key=_alike)]
        shown = groups
        if len(groups) > MAX_LINES:  # first to go is what has no name of its own in the language
            shown = [group for group in groups if group[0].layout is not None or group[0].note.startswith("all")][:MAX_LINES]
        lines = [_COLUMNS, *map(_table_line, shown)]
        widths = [min(max(len(line[i]) for line in lines), MAX_NAMES) for i in range(3)]
        homes = [None, *((group[0].function, group[0].file) for group in shown)]
        many = len(set(homes)) > 2
        for (number, name, shape, what), home, last in zip(lines, homes, [None, *homes], strict=False):
            if many and home is not None and home != last:
                yield _cut(f"  {'in':>{widths[0]}} {home[0]}, {Path(home[1]).name}")
            yield _cut(f"  {number:>{widths[0]}}  {name:<{widths[1]}}  {shape:<{widths[2]}}  {what}")
        if len(groups) > len(shown):
            yield f"  ... and {sum(map(len, groups)) - sum(map(len, shown))} more tensors: report.tensors"

    def _conflict(self, group: list[Conflict]) -> Iterator[str]:
        """One for all conflicts between the same two layouts."""
        first = group[0]
        more = ", ".join(f"{c.a} and {c.b}" for c in group[1:])
        same = "hold its rows in another order:" if first.common == first.rows else f"share {first.common} of {first.rows} rows:"
        yield _cut(f"{first.a} and {first.b} are both taken for {first.part}, but {same}")
        width = max(len(first.a), len(first.b))
        line_a, line_b = (f"line {line}" if line else "" for line in (first.line_a, first.line_b))
        for name, line, layout, note in (
            (first.a, line_a, first.layout_a, first.note_a),
            (first.b, line_b, first.layout_b, first.note_b),
        ):
            lead = f"  {name:<{width}}  {line:<{max(len(line_a), len(line_b))}}  "
            yield _cut(f"{lead}{layout or 'no layout'}{_who(layout)}")
            yield _cut(" " * len(lead) + note)
        if more:
            yield _cut(f"  likewise {more}")
        sides = [(first.layout_a, [c.b for c in group], [c.fix_b for c in group], "b")]
        sides.append((first.layout_b, [c.a for c in group], [c.fix_a for c in group], "a"))
        if first.wrong == "a":
            sides.reverse()
        if first.wrong:
            yield from _wrapped(f"{self.truth} is right: {self.truth_source}.")
        for layout, names, fixes, side in sides:
            fix = list(dict.fromkeys(line for text in fixes for line in text.splitlines()))
            if fix and first.wrong == side:
                yield f"So {', '.join(names)} {'is' if len(names) == 1 else 'are'} wrong. Mend:"
            elif fix:
                yield f"{'Were' if first.wrong else 'If'} {layout} {'' if first.wrong else 'is '}right, mend {', '.join(names)}:"
            yield from (f"    {line}" for line in fix)

    def _verdict(self) -> Iterator[str]:
        yield from (f"  ! {finding}" for finding in self.findings)
        for _, group in itertools.groupby(self.conflicts, key=lambda c: (c.layout_a, c.layout_b, c.wrong)):
            yield ""
            yield from self._conflict(list(group))
        if any(c.layout_a and c.layout_b and not c.wrong for c in self.conflicts):
            yield "The numbers cannot tell which is right. What can: the forward that the model was"
            yield "trained with (trace it), config.json's model_type, `triptych detect FILE`."
        if self.conflicts:
            yield "(A layout names the rows slowest first: h heads, d dims, parts side by side.)"
            return
        yield ""
        if not self.tensors:
            yield "No tensor with a name holds rows of it."
        elif self.misread:
            yield from _wrapped(f"{self.truth} is right: {self.truth_source}.")
            yield from _wrapped(f"But {'; '.join(self.misread)}." + (" Mend:" if self.misread_fix else ""))
            yield from (f"    {line}" for line in self.misread_fix.splitlines())
        else:
            fits = self.truth is not None and not any(finding.startswith(f"{self.truth} fits") for finding in self.findings)
            yield from _wrapped("No conflicts." + (f" {self.truth} is right: {self.truth_source}." if fits else ""))

    def _repr_html_(self) -> str:
        lines = (_table_line(list(group)) for _, group in itertools.groupby(self.tensors, key=_alike))
        rows = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in line)}</tr>" for line in lines)
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f"<div><p>{_escaped(chr(10).join(self._head()))}</p>{table}<pre>{_escaped(chr(10).join(self._verdict()))}</pre></div>"


_COLUMNS = ("line", "tensor", "shape", "holds")


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _alike(tensor: TracedTensor) -> tuple[object, ...]:
    return tensor.line, tensor.function, tensor.file, tensor.kind, tensor.shape, tensor.layout, tensor.layout is None and tensor.note


def _table_line(group: list[TracedTensor]) -> tuple[str, str, str, str]:
    first = group[0]
    shape = "x".join(map(str, first.shape)) or "1"
    what = ", ".join(t.part or "" for t in group) + f" of {first.layout}" if first.layout else first.note
    extra = [first.note] if first.layout and first.note else []
    if first.kind != "activation":
        extra.append(first.kind)
    return str(first.line or ""), ", ".join(t.name for t in group), shape, what + (f" ({', '.join(extra)})" if extra else "")


def _who(layout: Layout | None) -> str:
    who = next((entry.who for entry in catalog.entries() if entry.layout == layout), "")
    return f"   as {who}" if who and not who.startswith("nobody") else f"   {who}" if who else ""


def _wrapped(text: str) -> Iterator[str]:
    """Over as many lines as it takes: what a person needs whole, such as a source or an exception."""
    return iter(textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False))


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
