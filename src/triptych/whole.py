"""The tensors of a checkpoint in one folder, each with how ranks divide it: by its layout, by a rule, by the tensor that it scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import formats, parallel
from .checkpoint import Checkpoint, open_checkpoint
from .errors import PlanError
from .families.config import towers
from .formats import Tensor
from .moves import stamp_of
from .packed import BY_STAMP, Packed
from .parallel import COLUMN, COPY, ROW, STACKED, VOCAB, Role
from .pieces import star
from .sharding import EVEN, HEADS, Cut, along, even, has_heads, vocab
from .shards import Sharded, Whole, stamped

SCALES = ("_scale_inv", "_scale")
BLOCK = 128
"""Rows and columns of one FP8 scale, where the config does not say."""


def wholes_of(
    path: Path, layouts: Mapping[str, str], rules: Mapping[str, str], records: str | Path | None, sizes: Mapping[str, int]
) -> Sharded:
    """A checkpoint in one folder. Raises PlanError for a tensor that nothing says how to divide, and what `inspect` raises."""
    checkpoint = open_checkpoint(path, layouts, sizes, records=records)
    stored = checkpoint.stored
    if not stored.is_folder:
        raise PlanError("ranks are made of a folder", where=path, try_=f"give its folder: {path.parent}")
    if head := next((file.file for file in stored.files if file.head), None):
        raise PlanError("ranks are written as safetensors, which has no such dtypes", file=head)
    wholes = tuple(_Deciding(checkpoint, rules).all())
    return Sharded(path, None, (stored,), wholes, (*checkpoint.notes, *stored.notes))


class _Deciding:
    """Decides for every tensor of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, rules: Mapping[str, str]) -> None:
        stored = checkpoint.stored
        self.checkpoint, self.tensors = checkpoint, stored.tensors
        self.config: Mapping[str, Any] = formats.read_config(stored) or {}
        self.types = frozenset(view.type for view in towers(self.config))
        self.hand = parallel.by_hand(rules, stored.tensors)
        self.packed = {piece.tensor: (one, n) for one in checkpoint.projections for n, piece in enumerate(one.pieces)}
        self.stamps = stamped(stored.files)
        weights = [(name, one) for name, (one, _) in self.packed.items() if len(self.tensors[name].shape) == 2]
        self.outputs = {name.rsplit(".", 2)[0]: one.axis for name, one in weights if name.count(".") > 1}
        self.cuts: dict[str, tuple[Cut | None, str] | None] = {}

    def all(self) -> Iterator[Whole]:
        unsaid = [name for name in self.tensors if self.cut(name) is None]
        if unsaid:
            raise self._refusal(unsaid)
        for tensor in self.tensors.values():
            cut, why = self.cuts[tensor.name] or (None, "")
            told = self.stamps.get(tensor.name)
            if tensor.name in self.packed and cut is not None and told is None:
                one, n = self.packed[tensor.name]
                told = stamp_of(one, one.pieces[n], one.pieces, one.sizes)
            yield Whole(tensor.name, tensor.file, tensor.dtype, tensor.shape, cut, told, why)

    def _refusal(self, unsaid: list[str]) -> PlanError:
        name = unsaid[0]
        more = f"  and {len(unsaid) - 1} more" if len(unsaid) > 1 else ""
        tensor = self.tensors[name]
        if name in self.checkpoint.unknown:
            return PlanError("the layout of a fused tensor is not known", tensor=name + more, found=self.checkpoint.unknown[name],
                             try_=f"--layout '{star(name)}=LAYOUT' -s h=HEADS, or --rule '{star(name)}=copy'")  # fmt: skip
        return PlanError("nothing says how ranks divide a tensor", tensor=name + more, found=f"{tensor.dtype} {tensor.shape}",
                         try_=f"--rule '{star(name)}=copy', or column, row, vocab")  # fmt: skip

    def cut(self, name: str) -> tuple[Cut | None, str] | None:
        """(cut, who says so) of a tensor, or None when nobody knows."""
        if name not in self.cuts:
            self.cuts[name] = self._cut(self.tensors[name])
        return self.cuts[name]

    def _cut(self, tensor: Tensor) -> tuple[Cut | None, str] | None:
        name, shape = tensor.name, tensor.shape
        if name in self.hand:
            return self._by_role(tensor, self.hand[name])
        if name in self.packed:
            return self._by_layout(*self.packed[name])
        if name in self.checkpoint.unknown:
            return None
        for tail in SCALES:
            base = name.removesuffix(tail)
            if name.endswith(tail) and base in self.tensors:
                return self._scale(tensor, self.tensors[base])
        if math.prod(shape) <= 1:
            return None, "one number"
        role = parallel.by_name(name, shape, self.types)
        return self._by_role(tensor, role) if role else None

    def _by_layout(self, packed: Packed, n: int) -> tuple[Cut | None, str]:
        who = packed.source if packed.source != BY_STAMP else "the stamp"
        if packed.kind == "mlp":
            return along(EVEN, packed.axis, packed.pieces[n].layout, packed.sizes), who
        if not has_heads(packed.layout):
            return None, f"{who}: no heads"
        return along(HEADS, packed.axis, packed.pieces[n].layout, packed.sizes), who

    def _by_role(self, tensor: Tensor, role: Role) -> tuple[Cut | None, str] | None:
        axis, shape = role.axis, tensor.shape
        if role.role == COPY:
            return None, role.source
        if role.role == STACKED:
            beside = self.packed.get(tensor.name.replace("down_proj", "gate_up_proj"))
            if beside is None or len(shape) != 3:
                return None
            axis = 3 - beside[0].axis
        if axis is None or axis >= len(shape):
            raise PlanError("a tensor has no such axis", tensor=tensor.name, expected=f"axis {axis}", found=f"shape {shape}")
        self._check_output(tensor, role, axis)
        cuts = {COLUMN: even, ROW: even, STACKED: even, VOCAB: vocab}
        return cuts[role.role](shape[axis], axis), role.source

    def _check_output(self, tensor: Tensor, role: Role, axis: int) -> None:
        """A weight [in, out] that is taken for [out, in] is found out here: by its bias, by the projection in the same module."""
        stem = tensor.name.removesuffix(".weight")
        if len(tensor.shape) != 2 or stem == tensor.name or role.role not in (COLUMN, ROW) or role.source == parallel.BY_HAND:
            return
        output = axis if role.role == COLUMN else 1 - axis
        bias, beside = self.tensors.get(f"{stem}.bias"), self.outputs.get(stem.rpartition(".")[0], output)
        if beside != output or (bias is not None and bias.shape != (tensor.shape[output],)):
            found = f"bias {bias.shape}" if beside == output and bias else f"the projection beside it has its output along axis {beside}"
            raise PlanError("a weight seems to be stored the other way round", tensor=tensor.name, found=f"{tensor.shape}, {found}",
                            expected=f"{role.role} along axis {axis}   ({role.source})",
                            try_=f"--rule '{star(tensor.name)}={role.role} @ {1 - axis}'")  # fmt: skip

    def _scale(self, tensor: Tensor, base: Tensor) -> tuple[Cut | None, str] | None:
        """Scales go with the rows (or columns) that they scale: one for each, one for a block of them, one for all."""
        decided = self.cut(base.name)
        if decided is None or decided[0] is None or math.prod(tensor.shape) <= 1:
            return (None, f"scales {base.name}") if decided else None
        cut, why = decided[0], f"scales {base.name}"
        rows = base.shape[cut.axis]
        here = tensor.shape[cut.axis] if cut.axis < len(tensor.shape) else 1
        if here == rows:
            return cut, why
        if here == 1:
            return None, why
        block = self._block(cut.axis - len(base.shape))
        for period in dict.fromkeys((rows, *([rows // cut.sizes["t"]] if "t" in cut.sizes else []))):
            if here == rows // period * -(-period // block):
                return Cut(cut.role, cut.axis, cut.layout, cut.sizes, block, period), why
        raise PlanError("scales do not fit the tensor that they scale", tensor=tensor.name, found=f"{here} for {rows} of {base.name}",
                        expected=f"1, {rows}, or {-(-rows // block)} for blocks of {block}")  # fmt: skip

    def _block(self, axis: int) -> int:
        told = self.config.get("quantization_config")
        sizes = told.get("weight_block_size") if isinstance(told, Mapping) else None
        if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and 0 < size < 1 << 20 for size in sizes):
            return int(sizes[axis])
        return BLOCK
