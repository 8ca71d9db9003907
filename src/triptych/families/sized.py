"""What an entry says for a config: whether it applies, its sizes, its rotary order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from ..errors import FormatError, SizeError
from .config import View
from .formula import Missing, Names, evaluate
from .records import Entry

CONTRADICTED = "the config contradicts the given size"


@lru_cache(maxsize=4096)
def uses_layer(entry: Entry) -> bool:
    """Whether an entry says different things for different layers or stages."""
    return any(re.search(r"\b[LS]\b|\blayer\.", text) for text in (entry.when, entry.rotary, *(text for _, text in entry.sizes)))


def applies(entry: Entry, view: View, numbers: Mapping[str, int]) -> bool:
    """Whether the guard of an entry holds. Raises FormatError for a config that the guard cannot read."""
    return not entry.when or bool(evaluate(f"({entry.when}) or False", _names(view, numbers)))


def sizes_of(entry: Entry, view: View, numbers: Mapping[str, int], given: Mapping[str, int] | None = None) -> dict[str, int]:
    """The sizes that the formulae of an entry give, under its axes; `given` fills what the config does not say.

    Raises FormatError (a key is missing, or is no number), SizeError (a size is no positive whole number, or contradicts a given one).
    """
    out: dict[str, int] = {}
    names = _names(view, numbers)
    for axis, text in entry.sizes:
        try:
            value = evaluate(text, names)
        except FormatError:
            if given and axis in given:
                continue
            raise
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SizeError(f"the size of {axis!r} must be a positive whole number", found=f"{axis}={value!r}"[:60], equation=text)
        if given and given.get(axis, value) != value:
            raise SizeError(f"{CONTRADICTED} of {axis!r}", found=f"{axis}={value} in the config, {axis}={given[axis]} given")
        out[axis] = value
    used = {*entry.layout.axes, "h", "g", "r", "d"}
    return {**{axis: size for axis, size in (given or {}).items() if axis in used}, **out}


def rotary(entry: Entry, view: View, sizes: Mapping[str, int], numbers: Mapping[str, int]) -> str | None:
    """The rotary order in words, with the number of rotated dims when the head is rotated in part."""
    names = _names(view, numbers)
    rope = str(evaluate(entry.rope, names)) if entry.rope and " if " in entry.rope else entry.rope
    if not rope or not entry.rotary:
        return rope
    value = evaluate(entry.rotary, lambda name: sizes[name] if name in sizes else names(name))
    whole = sizes.get("d", 0)
    if not value:
        return None
    if isinstance(value, int) and value < 0:
        return f"partial {rope}: last {-value} of {whole} dims"
    return rope if value == whole else f"partial {rope}: first {value} of {whole} dims"


def _names(view: View, numbers: Mapping[str, int]) -> Names:
    def get(name: str) -> object:
        if name in ("L", "S"):
            return numbers[name] if name in numbers else Missing(f"number {name} in the tensor's name")
        if name.startswith("layer."):
            return view.layer(name.removeprefix("layer."), numbers.get("L", -1))
        return view.get(name)

    return get
