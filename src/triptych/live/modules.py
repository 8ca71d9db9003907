"""unfuse_, fuse_, undo: fused projections of a live model as separate modules, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..arrays import overlaps
from ..errors import PlanError
from ..layout import Layout
from ..pieces import listed, star
from . import optimizer as optimizers
from .hinged import Hinged, Pieces, linear
from .projections import Found, Layouts, Packing, find, tensor_fault
from .state import PACKED, Accept, accepts, in_form, turned

ENDS = ("weight", "bias")


@dataclass(frozen=True)
class Surgery:
    """What was done: module name -> the names of the modules that its rows are in now (none: the original module is back).

    `left`: module name -> why it was left as it is.
    """

    done: dict[str, tuple[str, ...]]
    left: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {"done": {name: list(parts) for name, parts in self.done.items()}, "left": self.left}

    def __str__(self) -> str:
        told = [(name, f"-> {', '.join(parts) or 'as it was'}") for name, parts in self.done.items()]
        told += [(name, f"left as it is: {why}") for name, why in self.left.items()]
        lines: dict[tuple[str, str], list[str]] = {}
        for name, what in told:
            lines.setdefault((star(name), what), []).append(name)
        several = ((f"{len(names)} x {starred}" if len(names) > 1 else names[0], what) for (starred, what), names in lines.items())
        return "\n".join(f"{name} {what}" for name, what in several) or "nothing to do"


def unfuse_(
    model: nn.Module,
    layouts: Layouts | None = None,
    *,
    only: str | Sequence[str] = (),
    optimizer: Any = None,
    **sizes: int,
) -> Surgery:
    """Every fused projection of a model becomes a module that holds one `nn.Linear` a part, and answers as the projection did.

    `layer.attention.query_key_value` then has the children `q`, `k`, `v`, with their own `weight` [rows, in] and `bias`; the model's own
    code runs unchanged. dtype, device, requires_grad, gradients, ties and hooks stay. A part that is one block of the fused weight is
    a view of it; all others are copies, and the fused weight is released, one projection at a time.

    Args:
        layouts: who says how rows lie: None runs the model (`tt.probe(model)`); "records" asks the family records of `model.config`;
            else a mapping of module name or glob to a layout, or what `tt.probe(model, *inputs)` returned.
        only: globs of module names, to do no others.
        optimizer: one or several; their parameter groups and state (Adam's moments, momenta) follow. Without, an optimizer keeps the
            fused parameters, which are empty until `undo`, and trains nothing of these projections.
        sizes: for layouts given by hand, as far as the row count leaves them open.
    Returns what was done, and what was left as it is with the reason (a layout that `probe` cannot tell, a bare parameter).
    Raises PlanError, before anything is changed: for a sharded or quantised model, and for what was asked by name and cannot be.

    >>> model = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    >>> print(unfuse_(model, {"qkv": "h (q|k|v) d"}, h=2))
    qkv -> q, k, v
    >>> model["qkv"].q.weight.shape, model["qkv"](torch.ones(1, 4)).shape
    (torch.Size([4, 4]), torch.Size([1, 12]))
    """
    only = (only,) if isinstance(only, str) else tuple(only)
    hinged = dict(_hinged(model))
    found = find(model, layouts, only, sizes, list(hinged))
    packed = {name: module for name, module in hinged.items() if not module.is_apart and _chosen(name, only)}
    jobs = [_Job(name, module, module.packing, module.packing.pieces) for name, module in packed.items()]
    jobs += [_Job(name, model.get_submodule(name), packing, packing.pieces) for name, packing in found.packings.items()]
    return _do(model, jobs, found, optimizer)


def fuse_(
    model: nn.Module,
    layout: Layout | str | None = None,
    *,
    only: str | Sequence[str] = (),
    optimizer: Any = None,
    **sizes: int,
) -> Surgery:
    """Joins the parts again: into the layout that the model's own code has (then the original modules are back), or into another one.

    In another layout a projection `X` keeps its rows in the one child `X.packed`, and its output is brought into the order of the model's
    code at every step. A model that is still fused is taken as it is, its layouts from `tt.probe(model)`.

    Args: layout: of the joined rows; None: as they were. only: globs of module names. optimizer, sizes: as for `unfuse_`.
    Returns what was done; a projection with other parts than those of `layout` is left as it is.
    Raises PlanError, before anything is changed: a part carries an adapter that is not merged, or is sharded; no projection has these
        parts. A model that calls q_proj, k_proj and v_proj one by one has none: it would never call a module in their place.
        IncompatibleError: the same parts in other numbers.
    """
    only = (only,) if isinstance(only, str) else tuple(only)
    packings = {name: module.packing for name, module in _hinged(model) if _chosen(name, only)}
    found = Found({}, {})
    if not packings and layout is not None:
        found = find(model, None, only, {})
        packings = found.packings
    jobs: list[_Job] = []
    left = dict(found.left)
    for name, packing in packings.items():
        module = model.get_submodule(name)
        target: Pieces | None = None
        if layout is not None:
            if not packing.has_parts_of(Layout(layout)):
                left[name] = f"its parts are {', '.join(packing.layout.parts)}"
                continue
            packing = packing.also(Layout(layout), **sizes)
            target = None if packing.is_order_of(Layout(layout)) else ((PACKED, Layout(layout)),)
        if isinstance(module, Hinged) or target is not None:
            jobs.append(_Job(name, module, packing, target))
    if not packings or len(left) == len(packings) > 0:
        raise PlanError(
            "there is nothing to fuse",
            module=listed(only) if only else type(model).__name__,
            found=next(iter(left.values()), "no projection that `unfuse_` took apart"),
            expected="parts that `unfuse_` made, or with a layout a fused projection",
            try_="a model that calls q_proj, k_proj, v_proj one by one would never call a fused module: join its files, `triptych convert`",
        )
    return _do(model, jobs, Found({}, left), optimizer)


def undo(model: nn.Module, *, optimizer: Any = None) -> Surgery:
    """Puts back every module that `unfuse_` and `fuse_` replaced, with the weights as they are now: same objects, bit for bit.

    What stays is that these modules load state dicts of all forms. Args and Raises as for `fuse_`; nothing to undo is no error.
    """
    return _do(model, [_Job(name, module, module.packing, None) for name, module in _hinged(model)], Found({}, {}), optimizer)


def state_dict(
    model: nn.Module,
    form: str = "original",
    layout: Layout | str | None = None,
    *,
    of: Mapping[str, Any] | None = None,
    **sizes: int,
) -> dict[str, Any]:
    """The state dict of a model in a form of choice, whatever form the model itself has.

    Args:
        form: "original": names and rows as the model's own code has them, which any program reads. "split": one tensor a part,
            `X.q.weight`. "fused": all rows under the original's name in `layout`; where that is another order, `X.layout` says so.
        layout, sizes: for "fused"; projections with other parts stay as in the original.
        of: a state dict in any form, in place of the model's own.
    Returns: tensors of the model or of `of`, new ones only where rows had to be moved.
    Raises PlanError when a part carries an adapter that is not merged.
    """
    packings: dict[str, Packing] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        packing = module.packing if isinstance(module, Hinged) else accepts(module)
        if packing is not None:
            packings[name] = packing
            if isinstance(module, Hinged) and of is None:
                module.linears()
    if not packings:
        packings = find(model, None, (), {}).packings
    return in_form(model.state_dict() if of is None else of, packings, form, layout, **sizes)


# Doing it


@dataclass(frozen=True, eq=False)
class _Job:
    """One module, and the children that its rows go to; None puts the original back."""

    name: str
    module: nn.Module
    packing: Packing
    target: Pieces | None

    @property
    def source(self) -> Pieces:
        return self.module.pieces if isinstance(self.module, Hinged) else (("", self.packing.layout),)

    @property
    def original(self) -> nn.Module:
        return self.module.original if isinstance(self.module, Hinged) else self.module

    def old(self, end: str) -> list[nn.Parameter]:
        """The weights, or biases, that the rows are in now. Raises PlanError when a part carries an adapter."""
        owners = self.module.linears() if isinstance(self.module, Hinged) else [self.module]
        found = [owner._parameters.get(end) for owner in owners]
        return [p for p in found if p is not None]

    def convert(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors shaped like the old parameters, shaped like the new ones; contiguous."""
        flip = self.packing.axis == 1 and tensors[0].dim() == 2
        rows = [tensor.T if flip and not isinstance(self.module, Hinged) else tensor for tensor in tensors]
        out = turned(rows, self.source, self.target or (("", self.packing.layout),), self.packing)
        return [(tensor.T if flip and self.target is None else tensor).contiguous() for tensor in out]


def _do(model: nn.Module, jobs: list[_Job], found: Found, optimizer: Any) -> Surgery:
    """All jobs, one projection at a time, after all checks."""
    carriers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [] if optimizer is None else [optimizer]
    jobs = list({id(job.module): job for job in reversed(jobs)}.values())[::-1]
    jobs, left = _untied(model, jobs, found)
    for job in jobs:
        for end in ENDS:
            if old := job.old(end):
                _check_plain(job.name, old)
                for carrier in carriers:
                    optimizers.place(carrier, old, job.name)
    twins = {id(job.old(end)[0]): (number, end) for number, job in reversed([*enumerate(jobs)]) for end in ENDS if job.old(end)}
    first = [{end: twins[id(job.old(end)[0])] for end in ENDS if job.old(end)} for job in jobs]
    parents = _parents(model)
    made: dict[tuple[int, str], list[nn.Parameter]] = {}
    with torch.no_grad():
        for number, job in enumerate(jobs):
            for end, twin in first[number].items():
                made[number, end] = made[twin] if twin in made else _new(job, end, carriers)
            module = _built(job, {end: made[number, end] for end in first[number]})
            for parent, key in parents[id(job.module)]:
                parent._modules[key] = module
    return Surgery({job.name: tuple(name for name, _ in job.target or ()) for job in jobs}, left)


def _check_plain(name: str, parameters: Sequence[Tensor]) -> None:
    if fault := next(filter(None, map(tensor_fault, parameters)), None):
        raise PlanError("the rows of a projection cannot be moved", module=name, found=fault)


def _new(job: _Job, end: str, carriers: Sequence[Any]) -> list[nn.Parameter]:
    """The new weights, or biases; the optimizers' state follows, and the old ones are released."""
    old = job.old(end)
    needs = any(p.requires_grad for p in old)
    tensors = job.convert([p.detach() for p in old])
    grads: list[Tensor | None] = [None] * len(tensors)
    if any(p.grad is not None for p in old):
        grads = [*job.convert([torch.zeros_like(p) if p.grad is None else p.grad for p in old])]
    shell = job.original._parameters[end]
    new = [nn.Parameter(tensor, needs) for tensor in tensors] if job.target is not None or shell is None else [shell]
    names = [f"{job.name}.{name}.{end}" for name, _ in job.target] if job.target is not None else [f"{job.name}.{end}"]
    for carrier in carriers:
        at = optimizers.place(carrier, old, job.name)
        if at is not None:
            optimizers.carry(carrier, at, old, new, job.convert, names)
    if job.target is None:
        new[0].data = tensors[0]
        new[0].requires_grad_(needs)
    else:
        for p in new:
            vars(p).update(vars(old[0]))
    for p, grad in zip(new, grads, strict=True):
        p.grad = grad
    for p in old:  # whoever still holds one finds it empty, not stale
        p.grad = None
        p.data = p.data.new_empty(0)
    return new


def _built(job: _Job, parameters: Mapping[str, list[nn.Parameter]]) -> nn.Module:
    """The module that takes the place of the job's."""
    original = job.original
    original.training = job.module.training
    original._is_full_backward_hook = job.module._is_full_backward_hook
    if job.target is None:
        if accepts(original) is None:
            original._register_load_state_dict_pre_hook(Accept(job.packing))  # type: ignore[no-untyped-call]
        return original
    biases: Sequence[nn.Parameter | None] = parameters.get("bias", [None] * len(job.target))
    linears = [linear(w, b, original.training) for w, b in zip(parameters["weight"], biases, strict=True)]
    return Hinged(original, job.packing, job.target, linears)


def _hinged(model: nn.Module) -> Iterator[tuple[str, Hinged]]:
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, Hinged))


def _chosen(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatchcase(name, glob) for glob in only)


def _parents(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Module -> every place where it stands."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                places[id(child)].append((parent, key))
    return places


def _untied(model: nn.Module, jobs: list[_Job], found: Found) -> tuple[list[_Job], dict[str, str]]:
    """The jobs whose parameters nothing else uses, and why the others are left. Jobs that share one and treat it alike stay.

    Raises PlanError for one that was asked for by name.
    """
    left = dict(found.left)
    uses = _uses(model)
    while fault := _tie_fault(jobs, uses):
        job, why = fault
        if found.by_name:
            raise PlanError("a projection cannot be replaced by modules", module=job.name, found=why)
        left[job.name] = why
        jobs = [other for other in jobs if other is not job]
    return jobs, left


_Uses = dict[int, list[tuple[str, nn.Module, Tensor]]]


def _uses(model: nn.Module) -> _Uses:
    """Storage -> (name, module, tensor) of all parameters and buffers in it."""
    uses: _Uses = defaultdict(list)
    for name, module in model.named_modules():
        for end, tensor in (*module._parameters.items(), *module._buffers.items()):
            if type(tensor) in (Tensor, nn.Parameter):
                uses[tensor.untyped_storage()._cdata].append((f"{name}.{end}", module, tensor))
    return uses


def _tie_fault(jobs: Sequence[_Job], uses: _Uses) -> tuple[_Job, str] | None:
    """The first job whose parameters share memory with a tensor that stays as it is, or is treated otherwise, and the sentence."""
    owners: dict[object, set[int]] = defaultdict(set)
    for job in jobs:
        owners[job.packing, job.source, job.target].update(map(id, (job.module, *job.module.children())))
    for job in jobs:
        alike = owners[job.packing, job.source, job.target]
        for end in ENDS:
            old = job.old(end)
            mine = {id(p) for p in old}
            for p in old:
                for name, module, tensor in uses[p.untyped_storage()._cdata]:
                    tied = id(tensor) in mine and id(module) not in alike
                    if tied or (id(tensor) not in mine and p.numel() and tensor.numel() and overlaps(p, tensor)):
                        return job, f"its {end} is also {name}, which stays as it is"
    return None
