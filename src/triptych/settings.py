"""The config of an output: switches in it that choose an order of rows are set to the order in which the rows now lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from . import families
from .beside import LINEAR, NORM
from .checkpoint import Checkpoint
from .families import Declaration, Record, Setting
from .formats import read_config
from .moves import Move
from .packed import Order, Piece, same_order
from .pieces import alone
from .sizes import Sizes

CONFIG = "config.json"
_At = tuple[Order, int]
"""The rows of a tensor, and the axis along which they lie."""


def needed(
    checkpoint: Checkpoint,
    moves: Sequence[Move],
    shapes: Mapping[str, tuple[int, ...]],
    records: Sequence[Record],
    sizes: Mapping[str, int],
) -> Setting | bool:
    """Whether the family's own code reads the output (`shapes` of its tensors) with the config as it is; else the setting of the config
    with which it does, or False where no switch in it tells."""
    config = read_config(checkpoint.stored)
    now, moved = _now(checkpoint, moves)

    def reads(table: Mapping[str, object] | None) -> bool:
        return _reads(families.declared(table, shapes, records, sizes), now, moved)

    return reads(config) or next((other for other in families.settings(config, records) if reads(other.config)), False)


def text_of(setting: Setting) -> bytes:
    """The file, as transformers indents it, keys in the order that they had."""
    return (json.dumps(setting.config, indent=2, ensure_ascii=False) + "\n").encode()


def _now(checkpoint: Checkpoint, moves: Sequence[Move]) -> tuple[dict[str, _At], set[str]]:
    """Every tensor of a projection as the output has it, and those of which the records must speak: all that moved, but for separate
    gate and up, which no record names."""
    gone = {move.packed.name for move in moves}
    now = {name: at for packed in checkpoint.projections if packed.name not in gone
           for name, at in _orders(packed.pieces, packed.sizes, packed.rope, packed.axis)}  # fmt: skip
    real = [move for move in moves if move.packed.kind not in (NORM, LINEAR)]
    after = {name: at for move in real for name, at in _orders(move.pieces, move.sizes, move.rope, move.axis)}
    return {**now, **after}, {piece.tensor for move in real if move.packed.kind != "mlp" or len(move.pieces) == 1 for piece in move.pieces}


def _orders(pieces: Sequence[Piece], sizes: Sizes, rope: str | None, axis: int) -> Iterator[tuple[str, _At]]:
    for piece in pieces:
        yield piece.tensor, (Order(piece.layout, sizes, rope), axis)


def _reads(said: Declaration, now: Mapping[str, _At], moved: set[str]) -> bool:
    """Whether a config and the records speak of all that moved, and of every tensor as it lies."""
    for one in said.projections:
        layouts = {one.name: one.layout} if one.fused else {name: alone(one.layout, part) for part, name in one.parts.items()}
        for name, layout in layouts.items():
            order, axis = now.get(name, (None, 0))
            if order is None or axis != one.axis or not same_order(Order(layout, one.sizes, one.rope), order):
                return False
            moved = moved - {name}
    return not moved
