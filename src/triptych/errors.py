"""One error tree.

TriptychError
├── LayoutError            a layout, or a tensor read under it, is wrong
│   ├── LayoutSyntaxError  the text is not a layout; carries the span
│   ├── SizeError          sizes are missing, unknown or do not divide
│   └── IncompatibleError  two layouts do not label the same rows
├── TraceError             a function cannot be traced as asked
├── FormatError            a file is damaged or not what it says it is
├── PlanError              a checkpoint, target or output is refused before anything is written
├── OutputError            writing failed half-way; nothing of it is left
├── MismatchError          two things that should be equal are not
└── MissingExtraError      an optional dependency is not installed

An error is a headline and a few labelled lines, always in the order where / expected and found / equation / what to do:

>>> print(SizeError("rows do not fill the layout", layout="h (q|k|v) d", found="13 rows", try_="rows=12").text())
SizeError: rows do not fill the layout
  layout   h (q|k|v) d
  found    13 rows
  try      rows=12
"""

from __future__ import annotations

MAX_FIELD = 10_000
"""Letters of one field that are shown; a layout of the greatest length, underlined, takes most of them."""


class TriptychError(Exception):
    """Root of all errors of this package: `what` is the headline, `fields` the labelled lines (label -> text)."""

    exit_code = 4

    def __init__(self, what: str, **fields: object) -> None:
        self.what = what
        self.fields: dict[str, object] = {k.rstrip("_"): v for k, v in fields.items() if v is not None}
        super().__init__(what)

    def __str__(self) -> str:
        return "\n".join([cut(self.what, MAX_FIELD), *(_line(k, v) for k, v in self.fields.items())])

    def text(self) -> str:
        """The whole message, as the command line prints it."""
        return f"{type(self).__name__}: {self}"

    def to_dict(self) -> dict[str, object]:
        """The same, for `--json`."""
        fields = {k: v if isinstance(v, (str, int, float, bool, list)) else str(v) for k, v in self.fields.items()}
        return {"error": type(self).__name__, "what": self.what, **fields}

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.fields), self.__dict__


def _rebuild(kind: type[TriptychError], what: str, fields: dict[str, object]) -> TriptychError:
    error = kind.__new__(kind)
    TriptychError.__init__(error, what, **fields)
    return error


def _line(label: str, value: object) -> str:
    first, *rest = cut(printable(str(value)), MAX_FIELD).split("\n")
    return "\n".join([f"  {label:<8} {first}".rstrip(), *(" " * 11 + line for line in rest)])


def printable(text: str) -> str:
    r"""Text of unknown origin, safe for a terminal: control characters become escapes, newlines stay.

    >>> printable("a\x1b[31m")
    'a\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cut(text: str, most: int = 80) -> str:
    """Text of unknown length, its middle left out when it has more than `most` letters.

    >>> cut("abcdefghijk", 9)
    'abc...ijk'
    """
    side = (most - 3) // 2
    return text if len(text) <= most else f"{text[:side]}...{text[-side:]}"


class LayoutError(TriptychError, ValueError):
    """A layout, or a tensor read under it, is wrong."""

    exit_code = 2


class LayoutSyntaxError(LayoutError):
    """The text is not a layout. `span` is the (start, stop) of the offending characters in `source`."""

    def __init__(self, what: str, source: str, span: tuple[int, int], try_: str | None = None) -> None:
        start, stop = span
        self.source, self.span = source, span
        super().__init__(what, layout=source + "\n" + " " * start + "^" * max(1, stop - start), try_=try_)


class SizeError(LayoutError):
    """Sizes are missing, unknown, or do not divide; or a tensor has another number of rows."""


class IncompatibleError(LayoutError):
    """Two layouts do not label the same rows at these sizes."""


class TraceError(TriptychError):
    """A function cannot be traced as asked (no fused projection, or more than one)."""

    exit_code = 2


class FormatError(TriptychError):
    """A file is damaged, or not what it says it is."""

    exit_code = 3


class PlanError(TriptychError):
    """A checkpoint, a target or an output place is refused; nothing was written."""

    exit_code = 4


class OutputError(TriptychError):
    """An output could not be written to its end (no room, an error of the disk); what was written is removed again."""

    exit_code = 4


class MismatchError(TriptychError, AssertionError):
    """Two things that should be equal are not."""

    exit_code = 1


class MissingExtraError(TriptychError, ImportError):
    """An optional dependency is not installed; the text names the pip command."""

    exit_code = 2

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed", try_=f"pip install 'triptych[{extra}]'")
