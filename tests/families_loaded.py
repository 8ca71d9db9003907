"""What files hold fused and modules hold apart: a file with labelled rows, loaded through transformers' own conversion of weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from triptych.live.places import Place, Table
from triptych.live.probe import Probed, Reading, read

Shapes = dict[str, tuple[int, ...]]


def loaded(model: Any) -> tuple[Shapes, dict[str, Probed]]:
    """The tensors of the model's file as the library writes it, and how the fused ones lie by where their rows went on loading.

    The library's own writer gives the names; the values are ours: a tensor's rows are numbered, so that each parameter
    of the loaded model shows which rows of which tensor it holds. What those mean is read off a run of the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(type(model.config), "save_pretrained"):  # a config made small need not be valid
            model.save_pretrained(folder)
        files = sorted(Path(folder).glob("*.safetensors"))
        written = {name: tensor for file in files for name, tensor in load_file(file).items()}
        shapes = {name: tuple(t.shape) for name, t in written.items()}
        first, count = {}, 0
        numbered = {}
        for name, tensor in written.items():
            rows = tensor.shape[0] if tensor.dim() else 1
            first[name] = count
            values = torch.arange(count, count + rows, dtype=torch.float32).view(-1, *[1] * (tensor.dim() - 1))
            numbered[name] = values.expand(tensor.shape).contiguous() if tensor.dim() else values[0]
            count += rows
        for file in files:
            save_file({name: numbered[name] for name in load_file(file)}, file, metadata={"format": "pt"})
        again = type(model).from_pretrained(folder, config=copy.deepcopy(model.config), dtype=torch.float32)
    came = _origins(again, first, shapes)
    reading = read(model)
    found = {}
    for name in {origin for origins in came.values() for origin, _ in origins}:
        parts = {p: [(row, n) for n, (origin, row) in enumerate(origins) if origin == name] for p, origins in came.items()}
        parts = {p: rows for p, rows in parts.items() if rows}
        if len(parts) > 1 and (seen := _fused(name, shapes[name], parts, reading)) is not None:
            found[name.removesuffix(".weight")] = seen
    return shapes, found


def _origins(model: Any, first: Mapping[str, int], shapes: Shapes) -> dict[str, list[tuple[str, int]]]:
    """Parameter -> (tensor of the file, row) of each of its rows."""
    owner = [(name, row) for name in first for row in range(shapes[name][0] if shapes[name] else 1)]
    result = {}
    for name, p in model.named_parameters():
        if p.dim() != 2 or p.is_meta:
            continue
        values = p.detach()
        whole = bool((values == values[:, :1]).all()) and bool((values[:, 0] == values[:, 0].round()).all())
        if whole and float(values.min()) >= 0 and float(values.max()) < len(owner):
            result[name] = [owner[int(v)] for v in values[:, 0].tolist()]
    return result


def _fused(name: str, shape: tuple[int, ...], parts: Mapping[str, list[tuple[int, int]]], reading: Reading) -> Probed | None:
    """The roles of the fused rows: those of the rows that they became."""
    table = Table(Place(name, shape, 0, 1))
    became: dict[tuple[str, int], int] = {}
    for parameter, rows in parts.items():
        seen = reading.tables.get(parameter)
        if seen is None:
            return None
        for row, number in rows:
            became[parameter, number] = row
            for part, (head, dim) in seen.roles.get(number, {}).items():
                table.add(row, part, head, dim)
    _in_order_of_rows(table)
    partners: dict[int, set[int]] = {}
    for parameter in parts:
        for number, others in reading.partners(parameter).items():
            if (parameter, number) in became:
                partners[became[parameter, number]] = {became[parameter, other] for other in others if (parameter, other) in became}
    return reading.probed(table, partners)


def _in_order_of_rows(table: Table) -> None:
    """Numbers the dims of q and k by their rows, where loading moved those of every head of both alike."""
    orders = set()
    for part in ("q", "k"):
        heads: dict[int, list[int]] = {}
        for row in sorted(table.roles):
            if part in table.roles[row]:
                head, dim = table.roles[row][part]
                heads.setdefault(head, []).append(dim)
        orders |= {tuple(dims) for dims in heads.values()}
    if len(orders) != 1:
        return
    place = {dim: i for i, dim in enumerate(orders.pop())}
    for roles in table.roles.values():
        for part in {"q", "k"} & roles.keys():
            roles[part] = (roles[part][0], place[roles[part][1]])
