"""The stamp: what a converted file says about its own layouts, in `__metadata__` under the key `triptych`.

    {"version": 1, "layouts": {tensor: {"layout", "sizes", "axis", "projection", "parts", "kind", "rope"}}, "plan": digest}

`projection` is the name of the projection in the checkpoint that was converted; tensors that share it belong together. `parts` names the
tensors of its parts: those in the file when the tensor is one of them, else those that splitting would write. The stamp was written with
the bytes, so it outranks what a family record says of the original model; a layout given by hand must agree with it.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .axes import ALIASES
from .errors import FormatError, LayoutError
from .formats import Header, parse_json
from .layout import Layout
from .sizes import Sizes, bind

KEY, VERSION = "triptych", 1


@dataclass(frozen=True, slots=True)
class Stamped:
    """How one tensor lies along `axis`, and what it belongs to."""

    layout: Layout
    sizes: Sizes
    axis: int
    projection: str
    parts: tuple[tuple[str, str], ...] = ()
    kind: str = "attention"
    rope: str | None = None

    def to_dict(self) -> dict[str, Any]:
        sizes = {axis: self.sizes[axis] for axis in dict.fromkeys(ALIASES.get(axis, axis) for axis in self.layout.axes)}
        told = {"layout": str(self.layout), "sizes": sizes, "axis": self.axis}
        return {**told, "projection": self.projection, "parts": dict(self.parts), "kind": self.kind, "rope": self.rope}


def encode(layouts: Iterable[tuple[str, Stamped]], digest: str) -> str:
    """The text of a stamp."""
    table = {"version": VERSION, "layouts": {name: stamped.to_dict() for name, stamped in layouts}, "plan": digest}
    return json.dumps(table, ensure_ascii=False, separators=(",", ":"))


def decode(file: Header) -> dict[str, Stamped]:
    """The layouts that a file was stamped with; none when it has no stamp. Raises FormatError for a stamp that makes no sense."""
    text = file.metadata.get(KEY)
    if text is None:
        return {}
    table = parse_json(text.encode("utf-8", "surrogatepass"), file.file)
    if table.get("version") != VERSION:
        raise FormatError("the stamp has a version that this program does not know", file=file.file, expected=VERSION,
                          found=reprlib.repr(table.get("version")))  # fmt: skip
    layouts = table.get("layouts")
    if not isinstance(layouts, dict):
        raise FormatError("the stamp is damaged", file=file.file, expected="a table of layouts", found=reprlib.repr(layouts))
    present = {tensor.name for tensor in file.tensors}
    for name in layouts:
        if name not in present:
            raise FormatError("the stamp names a tensor that is not there", tensor=name, file=file.file,
                              try_="the file was changed after its conversion: remove the stamp or restore the tensor")  # fmt: skip
    return {name: _stamped(name, entry, file.file) for name, entry in layouts.items()}


def _stamped(name: str, entry: Any, file: str) -> Stamped:
    try:
        layout, sizes, axis = _layout(entry["layout"]), _sizes(entry["sizes"]), entry["axis"]
        projection, parts, kind, rope = (
            entry.get("projection", name),
            entry.get("parts", {}),
            entry.get("kind", "attention"),
            entry.get("rope"),
        )
        told = Stamped(layout, bind(layout, **sizes), axis, projection, tuple(parts.items()), kind, rope)
    except (TypeError, KeyError, AttributeError, LayoutError) as error:
        found = str(error).partition("\n")[0] if isinstance(error, LayoutError) else reprlib.repr(entry)
        raise FormatError("the stamp is damaged", tensor=name, file=file, found=found, expected="layout, sizes, axis") from None
    texts = [projection, kind, *parts, *parts.values(), *([rope] if rope is not None else [])]
    if type(axis) is not int or axis < 0 or not all(isinstance(text, str) for text in texts):
        raise FormatError("the stamp is damaged", tensor=name, file=file, found=reprlib.repr(entry))
    return told


_layout = lru_cache(maxsize=1024)(Layout)  # one value for all tensors that are stamped alike


def _sizes(table: Mapping[str, int]) -> dict[str, int]:
    return {str(axis): size for axis, size in table.items()}
