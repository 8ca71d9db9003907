"""`probe`: the layout of every fused projection, read off the model's own code."""

from __future__ import annotations

import contextlib
import copy
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TraceError
from ..layout import Layout
from ..sizes import Sizes
from .fit import fit
from .follow import Follow, Still
from .inputs import Call, inputs_of
from .intercept import recurrences
from .labels import Log
from .ledger import Ledger
from .places import Columns, Place, Table, rotary
from .products import reader
from .watch import Watch

NO_SIZES = Sizes({})
LATENT = ("h (k dn|v dv)",)
STATE_SPACE = ("z h d|x h d|B g s|C g s|dt h", "x h d|B g s|C g s", "dt rank|B s|C s", "h d (x|z)")
"""Spellings for projections whose kind is known: written so even where dn = dv or h = g."""


@dataclass(frozen=True)
class Probed:
    """One projection as executed. `layout` is None when no expression says what was seen, and `note` then says why.

    `rotary`: "half", "interleaved", "partial half: first 16 of 64 dims", or None when its rows are not rotated; "half or interleaved" for
        2 dims, of which both orders are the same.
    """

    layout: Layout | None
    sizes: Sizes
    rotary: str | None
    note: str

    def to_dict(self) -> dict[str, Any]:
        layout = str(self.layout) if self.layout is not None else None
        return {"layout": layout, "sizes": dict(self.sizes), "rotary": self.rotary, "note": self.note}

    def __str__(self) -> str:
        words = [f"{self.layout}  {self.sizes.of(self.layout)}"] if self.layout is not None else []
        return "  ".join(words + [text for text in (self.rotary, self.note) if text])


def probe(model: Any, *args: Any, **kwargs: Any) -> dict[str, Probed]:
    """Runs the model once on a few tokens and reads which row of each projection reached which part, head and dim.

    Args: model: any `nn.Module`; or a transformers config (or a config.json's content), of which the smallest instance is built.
        args, kwargs: what to call it with;
        found by itself for transformers models, `nn.MultiheadAttention`, and modules that take ids or [batch, tokens, features].
    Returns module name -> `Probed`; a bare parameter has its own name. Only projections that hold several parts, or one part in two
        roles, or the two pieces of a query. The model is left as it was.
    Raises TraceError: it has no parameters to label (meta device), or cannot be run.

    >>> from torch import nn
    >>> print(probe(nn.MultiheadAttention(12, 3))["in_proj_weight"])
    (q|k|v) h d  h=3 d=4
    """
    if isinstance(model, (str, os.PathLike)):
        raise TraceError("probe takes a module, or a config", found=str(model), expected="a path is no config",
                         try_="tt.probe(json.load(open('config.json')))")  # fmt: skip
    if not isinstance(model, nn.Module):
        return smallest(model)[1]
    reading = read(model, *args, **kwargs)
    tables = sorted(reading.tables.items())
    return {_shown(name): found for name, table in tables if (found := reading.probed(table, reading.partners(name))) is not None}


@dataclass(frozen=True)
class Reading:
    """What a run showed: the roles of the rows of every parameter, which rows were turned into each other, and what multiplies the
    outputs of attention."""

    tables: dict[str, Table]
    rotations: tuple[Tensor, ...]
    outputs: dict[str, Columns]

    def partners(self, name: str) -> dict[int, set[int]]:
        """Row of a parameter -> the rows it is rotated with."""
        partners: dict[int, set[int]] = {}
        place = self.tables[name].place
        stop = place.first + int(np.prod(place.shape))
        for pairs in self.rotations:
            ours = pairs[:, ((pairs >= place.first) & (pairs < stop)).all(0)]
            for a, b in {*map(tuple, ours.T.tolist())}:
                partners.setdefault(place.row(a), set()).add(place.row(b))
        return partners

    def probed(self, table: Table, partners: Mapping[int, set[int]]) -> Probed | None:
        """The layout of a table's rows; None when it holds one part in one role."""
        table = _in_halves(table, partners)
        parts = {part for roles in table.roles.values() for part in roles}
        alike = any(len(roles) > 1 for roles in table.roles.values())
        if len(parts) < 2 and not alike:
            return None
        turned = rotary(table, partners)
        notes = sorted(table.doubts)
        rows = table.listing()
        found = fit(rows, LATENT if table.latent else STATE_SPACE if parts & {"x", "B"} else ()) if rows is not None else None
        if rows is None:
            lost = sum(number not in table.roles for number in range(table.place.rows))
            notes.append(
                f"{lost} of {table.place.rows} rows reach no attention" if lost else "rows stand in different places in their two roles"
            )
        elif found is None:
            notes.append("no layout says where the rows went: " + _sample(rows))
        if found is None:
            return Probed(None, NO_SIZES, turned, "; ".join(notes))
        return Probed(found.layout, found.sizes, turned, "; ".join(notes))


def read(model: nn.Module, *args: Any, **kwargs: Any) -> Reading:
    """Runs a model as `probe` does, and gives the roles of all rows of all its parameters, fused or not."""
    owners = _parameters(model)
    if any(p.is_meta for p in owners.values()):
        raise TraceError("a model on the meta device cannot be run", try_="tt.probe(model.config) builds a small one")
    first = _numbered(owners)
    with untouched(model):
        calls = [(args, kwargs)] if args or kwargs else inputs_of(model)
        log = _run(model, calls, first, still=False)
        places = _places(owners, first, log)
        found = reader(log, places)
        tables = found.tables
        if log.unclear or any(table.listing() is None for table in tables.values()) or not tables:
            still = reader(_run(model, calls, first, still=True), places).tables
            for name, table in still.items():
                if name not in tables or (tables[name].listing() is None and len(table.roles) >= len(tables[name].roles)):
                    tables[name] = table
    return Reading(tables, tuple(log.rotations), found.outputs())


def smallest(config: Any, **overrides: Any) -> tuple[nn.Module, dict[str, Probed]]:
    """The smallest instance of a transformers config (or model type) that runs, and what it shows. `overrides` are config keys.

    Raises TraceError: none can be built or none runs.
    """
    from .tiny import instances

    failed: list[str] = []
    for model in instances(config, failed, **overrides):
        try:
            return model, probe(model)
        except TraceError as error:
            failed.append(f"{type(model).__name__}: {error.fields['found']}")
    name = config.get("model_type") if isinstance(config, Mapping) else config if isinstance(config, str) else type(config).__name__
    raise TraceError("no small model of this config runs", where=name, found=failed[0][:300] if failed else "no model class")


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() >= 1}


def _numbered(owners: Mapping[str, Tensor]) -> dict[int, int]:
    """Storage -> number of its first element, counted over all storages."""
    first: dict[int, int] = {}
    count = 0
    for p in owners.values():
        storage = p.untyped_storage()
        if storage._cdata not in first:
            first[storage._cdata] = count
            count += storage.nbytes() // p.element_size()
    return first


def _run(model: nn.Module, calls: list[Call], first: Mapping[int, int], still: bool) -> Log:
    """The log of the first call that runs. Models and attention modules inside that it does not reach run by themselves."""
    ledger, failed = _called(model, calls, first, still)
    for part in _inside(model):
        reached = ledger is not None and any(first.get(p.untyped_storage()._cdata) in ledger.log.contracted for p in part.parameters())
        if not reached:
            own, error = _called(part, inputs_of(part), first, still, ledger)
            ledger, failed = own or ledger, failed or error
    if ledger is None:
        what = f"{type(failed).__name__}: {failed}" if failed is not None else "nobody knows what to call it with"
        raise TraceError(
            "the model cannot be run", where=type(model).__name__, found=what[:300], try_="tt.probe(model, *inputs)"
        ) from failed
    return ledger.log


def _called(
    model: nn.Module, calls: list[Call], first: Mapping[int, int], still: bool, ledger: Ledger | None = None
) -> tuple[Ledger | None, Exception | None]:
    """The ledger after the first call that runs (the given one goes on), or None and what the first call raised."""
    failed: Exception | None = None
    for args, kwargs in calls:
        notes = ledger or Ledger(first)
        try:
            with torch.no_grad(), recurrences(model, notes), Watch(Follow(notes)), Still() if still else contextlib.nullcontext():
                model(*copy.copy(args), **copy.copy(kwargs))
            return notes, None
        except Exception as error:  # whatever the model's own code raises
            failed = failed or error
    return None, failed


def _inside(model: nn.Module) -> list[nn.Module]:
    """Models of transformers and attention modules of torch inside a model, outer ones first."""
    return [m for m in model.modules() if m is not model and (isinstance(m, nn.MultiheadAttention) or hasattr(m, "main_input_name"))]


def _places(owners: Mapping[str, Tensor], first: Mapping[int, int], log: Log) -> list[Place]:
    places = []
    seen = set()
    for name, p in owners.items():
        start = first[p.untyped_storage()._cdata] + int(p.storage_offset())
        if start in seen:
            continue
        seen.add(start)
        stride = log.contracted.get(start)
        summed = next(
            (axis for axis in range(p.dim() - 1, 0, -1) if p.stride(axis) == stride), 0 if stride is not None and p.dim() > 1 else None
        )
        places.append(Place(name, tuple(p.shape), start, summed))
    return places


def _in_halves(table: Table, partners: Mapping[int, set[int]]) -> Table:
    """The query of an indexer, of which some dims are rotated: in two parts, as in the attention that it chooses for."""
    turned = {number for number in table.roles if partners.get(number)}
    if not table.chooses or {part for roles in table.roles.values() for part in roles} != {"q"} or not 0 < len(turned) < len(table.roles):
        return table
    first = {part: min(table.roles[n]["q"][1] for n in table.roles if (n in turned) == (part == "rope")) for part in ("rope", "nope")}
    result = Table(table.place, doubts=table.doubts, chooses=True)
    for number, roles in table.roles.items():
        part = "rope" if number in turned else "nope"
        result.add(number, part, roles["q"][0], roles["q"][1] - first[part])
    return result


def _sample(rows: list[Any]) -> str:
    return ", ".join(f"{r.part}[{r.head},{r.dim}]" for r in rows[:6]) + ("..." if len(rows) > 6 else "")


def _shown(name: str) -> str:
    return name.removesuffix(".weight")


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no fused fast path; afterwards flags, buffers and random numbers are as before."""
    training = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, b, b.detach().clone() if b is not None else None)
        for module in model.modules()
        for name, b in module._buffers.items()
    ]
    fast, python, numpy = torch.backends.mha.get_fastpath_enabled(), random.getstate(), np.random.get_state()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in training:
            module.training = False
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(python)
        np.random.set_state(numpy)
        for module, flag in training.items():
            module.training = flag
        for module, name, buffer, value in buffers:
            if buffer is not None and value is not None and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
            module._buffers[name] = buffer
