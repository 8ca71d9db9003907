"""The three who can know a layout must agree: a record or a person (declared), the stamp, and the weights (inferred, `detect`).

Weights are evidence and never decide. They are asked with `check_weights`, and without it where a record is ambiguous: files of one model
exist in several orders, with the same names, shapes and config. Where they contradict, everything stops and both sides are shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .detect import CONFIDENT, Verdict
from .detect_files import detect_checkpoint, packed_axis
from .errors import PlanError, TriptychError
from .formats import Tensor
from .layout import Layout
from .packed import BY_RECORD, Packed
from .pieces import star
from .rowmap import parts
from .sizes import Sizes

AGREES, CONTRADICTS, UNTOLD = "agrees", "contradicts", "cannot tell"
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
MAX_ALONE = 4
"""Tensors that are asked one by one where tensors of one kind have different layouts."""


@dataclass(frozen=True)
class Agreement:
    """What the weights of one kind of tensor say of the layout that they are believed to have.

    `tensors`: all of the kind; `told`, `sizes`, `source`: the layout, and who says so; `inferred`: what `detect` finds, with sizes where it
    tells them; `evidence` in nats; `reasons` why nothing can be told. `ambiguous`: the other layouts, as the record gives them.
    """

    name: str
    tensors: tuple[str, ...]
    told: str
    sizes: str
    source: str
    outcome: str
    inferred: str | None
    evidence: float
    reasons: tuple[str, ...]
    ambiguous: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """All of it in one line."""
        told = f"{self.told} with {self.sizes}, as {_who(self.source)} says"
        if self.outcome == AGREES:
            return f"the weights of {self.name} agree with {told}: {self.evidence:.0f} nats"
        if self.outcome == CONTRADICTS:
            return f"the weights of {self.name} say {self.inferred}, {self.evidence:.0f} nats ahead, and not {told}"
        return f"the weights of {self.name} cannot tell whether it is {told}: {'; '.join(self.reasons)}"

    def to_dict(self) -> dict[str, Any]:
        told = {"name": self.name, "tensors": len(self.tensors), "layout": self.told, "sizes": self.sizes, "source": self.source}
        said = {"outcome": self.outcome, "inferred": self.inferred, "evidence": round(self.evidence, 1), "reasons": list(self.reasons)}
        return {**told, **said, "ambiguous": list(self.ambiguous)}


def agreements(path: str | Path, projections: Iterable[Packed], tensors: Mapping[str, Tensor]) -> tuple[Agreement, ...]:
    """Ask the weights about every fused attention weight, kind by kind; and about all whose record is ambiguous."""
    kinds: dict[tuple[object, ...], list[Packed]] = {}
    for one in projections:
        if one.fused and (one.kind == "attention" or one.ambiguous) and len(tensors[one.name].shape) > 1:
            key = (star(one.name), tensors[one.name].shape, one.layout, one.sizes, one.axis, one.source)
            kinds.setdefault(key, []).append(one)
    several = {kind[0] for kind in kinds if sum(other[0] == kind[0] for other in kinds) > 1}
    return tuple(_agreement(Path(path), members, tensors, star(members[0].name) in several) for members in kinds.values())


def checked(
    path: str | Path, projections: Sequence[Packed], tensors: Mapping[str, Tensor], check_weights: bool = False, settle: bool = True
) -> tuple[Agreement, ...]:
    """The agreements of all projections, or without `check_weights` of those whose record is ambiguous.

    Raises PlanError, with both sides, where the weights contradict, and with `settle` where they cannot settle an ambiguous record.
    """
    found = agreements(path, [one for one in projections if check_weights or one.ambiguous], tensors)
    for one in found:
        by_hand = f"--layout '{one.name}=LAYOUT'"
        told = f"{one.told} with {one.sizes}   ({_who(one.source)})"
        if one.outcome == CONTRADICTS:
            raise PlanError(
                "the weights contradict the layout", tensor=_several(one), expected=told,
                found=f"{one.inferred}   (the weights: {one.evidence:.0f} nats ahead)",
                try_=f"`triptych detect PATH '{one.name}'` shows the evidence\n{_as_inferred(one)} takes what the weights say,\n"
                f"{by_hand} without --check-weights says what you know better",
            )  # fmt: skip
        if settle and one.outcome == UNTOLD and one.ambiguous:
            raise PlanError(
                "files of this model exist in more than one order", tensor=_several(one),
                expected="\n".join([told, *(f"{other}   (other files of the model)" for other in one.ambiguous)]),
                found=f"weights that cannot tell: {'; '.join(one.reasons)}", try_=f"{by_hand} says which one it is",
            )  # fmt: skip
    return found


def _as_inferred(one: Agreement) -> str:
    """The options that take what the weights say."""
    text, _, sizes = (one.inferred or "").partition(" with ")
    axes = Layout(text).axes
    return " ".join([f"--layout '{one.name}={text}'", *(f"-s {size}" for size in sizes.split() if size.partition("=")[0] in axes)])


def _several(one: Agreement) -> str:
    return one.tensors[0] + (f"  and {len(one.tensors) - 1} like it" if len(one.tensors) > 1 else "")


def _who(source: str) -> str:
    return "its record" if source.startswith(BY_RECORD) else "its stamp" if source == "stamp" else "the layout by hand"


def _agreement(path: Path, members: Sequence[Packed], tensors: Mapping[str, Tensor], several: bool) -> Agreement:
    one = members[0]
    names, ambiguous = tuple(member.name for member in members), tuple(map(str, one.ambiguous))
    start = Agreement(star(one.name), names, str(one.layout), one.sizes.of(one.layout), one.source, UNTOLD, None, 0.0, (), ambiguous)
    told = pairing(one.layout, one.sizes)
    shape = tensors[one.name].shape
    if told is None or len(shape) != 2 or packed_axis(shape) != one.axis:
        return replace(start, reasons=("statistics know q, k and v of one head size only, packed along the longer axis",))
    patterns = ["*".join(map(escape, NUMBER.split(one.name)))]
    if several or len(members) == 1:
        patterns = [escape(name) for name in start.tensors[:MAX_ALONE]]
    heads = one.sizes.get("h")
    verdicts = []
    try:
        for pattern in patterns:
            kinds = detect_checkpoint(path, pattern, heads=heads, kv_heads=one.sizes.get("g", heads)).kinds
            verdicts += [kind.verdict for kind in kinds if set(kind.layers) <= set(start.tensors)]
    except TriptychError as error:
        return replace(start, reasons=(error.what,))
    if not verdicts:
        return replace(start, reasons=("tensors of other kinds have the same names",))
    return _compared(told, min(verdicts, key=lambda verdict: verdict.evidence), start)


def _compared(told: Pairing, verdict: Verdict, start: Agreement) -> Agreement:
    if verdict.layout is None or not verdict.ranked:
        return replace(start, evidence=verdict.evidence, reasons=verdict.reasons)
    layout, sizes = (verdict.layout, verdict.sizes) if verdict.sizes is not None else (verdict.ranked[0].layout, verdict.ranked[0].sizes)
    inferred = f"{verdict.layout}" + (f" with {verdict.sizes.of(verdict.layout)}" if verdict.sizes is not None else "")
    found = replace(start, inferred=inferred, evidence=verdict.evidence)
    if _same(told, pairing(layout, sizes), verdict.sizes is not None):
        return replace(found, outcome=AGREES)
    if verdict.confidence != CONFIDENT:
        return replace(found, reasons=(f"they only hint at {inferred}", *verdict.reasons))
    if not any(_same(told, pairing(one.layout, one.sizes), False) for one in verdict.ranked):
        return replace(found, reasons=("this layout is not among those that `detect` compares",))
    return replace(found, outcome=CONTRADICTS)


@dataclass(frozen=True)
class Pairing:
    """What statistics can see of a layout: which rows of q belong to which row of k, v in the order of its labels, k cut into heads.

    Where q and k are of one size they may change places, and rotary order moves both alike: layouts that differ in no more are the same.
    """

    pairs: bytes
    heads: bytes
    v: bytes


def pairing(layout: Layout, sizes: Sizes) -> Pairing | None:
    """The pairing of a layout of q, k and v with one head size; None for any other.

    >>> from .sizes import bind
    >>> neox, swapped = (Layout(text) for text in ("h (q|k|v) d", "h (k|q|v) d"))
    >>> pairing(neox, bind(neox, h=3, d=2)) == pairing(swapped, bind(swapped, h=3, d=2))
    True
    """
    rows: dict[str, list[NDArray[np.int64]]] = {}
    for part in parts(layout, sizes):
        if part.path.zero or len(part.path.names) != 1:
            return None
        rows.setdefault(part.path.names[0].split(".")[0], []).append(part.rows())
    if set(rows) != {"q", "k", "v"}:
        return None
    try:
        q, k, v = (np.concatenate(rows[name], axis=1) for name in "qkv")
    except ValueError:  # parts of one role with other numbers of heads
        return None
    if k.shape != v.shape or q.shape[1] != k.shape[1] or len(q) % len(k):
        return None
    together = q.reshape(len(k), len(q) // len(k), -1).swapaxes(1, 2).reshape(k.size, -1)
    flat = k.reshape(-1, 1)
    pairs = (
        np.sort(np.concatenate([together, flat], axis=1), axis=1) if q.shape == k.shape else np.hstack([flat, np.sort(together, axis=1)])
    )
    heads = np.sort(np.concatenate([k, q.reshape(len(k), -1)], axis=1), axis=1)
    paired, cut = (table[np.argsort(table[:, 0])].tobytes() for table in (pairs, heads))
    return Pairing(paired, cut, v.tobytes())


def _same(a: Pairing, b: Pairing | None, heads: bool) -> bool:
    return b is not None and (a.pairs, a.v) == (b.pairs, b.v) and (not heads or a.heads == b.heads)
