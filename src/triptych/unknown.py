"""What to say where nobody knows how the rows of a fused tensor lie: who might, and the option that says it by hand."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from . import families
from .checkpoint import Checkpoint
from .errors import PlanError
from .formats import Tensor
from .layout import Layout
from .pieces import listed, shown, star, stem


def refusal(checkpoint: Checkpoint) -> PlanError:
    """The error of a plan for a checkpoint with tensors of unknown layout. Layouts of tensors with such names are shown, none is chosen."""
    unknown, tensors = checkpoint.unknown, checkpoint.stored.tensors
    first = next(iter(unknown))
    weight = stem(first)[0] + ".weight"
    name = weight if weight in unknown else first
    where = shown(name) + (f"  and {len(unknown) - 1} more" if len(unknown) > 1 else "")
    if families.CONTRADICTED in unknown[name]:
        return PlanError("a size given by hand contradicts the config", tensor=where, found=unknown[name],
                         try_="leave out that -s; or say with --layout how the rows lie, which stands over the config")  # fmt: skip
    near = {} if "does not fit" in unknown[name] else families.namesakes(name, tensors[name].shape)
    near = {layout: who for layout, who in near.items() if checkpoint.family in who} or near
    text = next(iter(near), "LAYOUT")
    told = "".join(f"\n{layout}   ({listed(who, 2)})" for layout, who in near.items())
    whose = f"it is of {near[text][0]}" if near else "you know it"
    return PlanError(
        "the layout of a fused tensor is not known",
        tensor=where,
        found=unknown[name],
        expected=f"a record; those of such a name have{told}" if near else None,
        try_=f"--layout '{_glob(name, unknown, tensors)}={text}' {_sizes(text)} if {whose}; `triptych inspect` lists all",
    )


def _glob(name: str, unknown: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """A glob of the unknown tensors like this one, its bias with it."""
    both = f"{star(stem(name)[0])}.*"
    met = [other for other in tensors if fnmatchcase(other, both)]
    return both if name in met and all(other in unknown for other in met) else star(name)


def _sizes(layout: str) -> str:
    """The sizes that a layout cannot do without: d follows from the rows."""
    used = Layout(layout).axes if layout != "LAYOUT" else ()
    return "-s h=HEADS" + " -s g=KV_HEADS" * bool({"g", "n"} & set(used)) + " -s t=RANKS" * ("t" in used)
