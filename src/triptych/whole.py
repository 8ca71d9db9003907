"""The tensors of a checkpoint in one folder, each with how ranks divide it: by its layout, by a rule, by the tensor that it scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import formats, parallel, quantised
from .agree import checked
from .checkpoint import Checkpoint, known
from .errors import PlanError
from .families import CONTRADICTED, load_records
from .families.config import towers
from .formats import Stored, Tensor
from .moves import stamp_of
from .packed import BY_RECORD, BY_STAMP, Packed
from .parallel import COLUMN, COPY, ROW, STACKED, VOCAB, Role
from .pieces import base_names, star
from .quantised import BLOCK, GROUPED, IN, Pack, Quantised, block_of, group_of
from .sharding import EVEN, HEADS, Cut, along, even, has_heads, vocab
from .shards import Sharded, Whole, stamped
from .unknown import refusal

SCALES = ("_scale_inv", "_scale", "_zero_point")


def wholes_of(
    path: Path, layouts: Mapping[str, str], rules: Mapping[str, str], records: str | Path | None, sizes: Mapping[str, int]
) -> Sharded:
    """A checkpoint in one folder. Raises PlanError for a tensor that nothing says how to divide, and what `inspect` raises."""
    stored = formats.read(path)
    if not stored.is_folder:
        raise PlanError("ranks are made of a folder", where=path, try_=f"give its folder: {path.parent}")
    if head := next((file.file for file in stored.files if file.head), None):
        raise PlanError("ranks are written as safetensors, which has no such dtypes", file=head)
    packed = quantised.unpacked(stored, rules, skip=stamped(stored.files))
    checkpoint = known(packed.plain, layouts, sizes, records=load_records(records) if records else ())
    wholes = tuple(Deciding(checkpoint, rules, stored, packed).all())
    agreements = checked(path, checkpoint.projections, packed.plain.tensors)
    return Sharded(path, None, (stored,), wholes, (*checkpoint.notes, *(agreement.sentence for agreement in agreements)))


class Deciding:
    """Decides for every tensor of a checkpoint: what is known of it, rules by hand, and what is stored, packed numbers as they are.

    `out_in`: every weight is [out, in], whatever the model's own files have.
    """

    def __init__(self, checkpoint: Checkpoint, rules: Mapping[str, str], stored: Stored, packed: Quantised, out_in: bool = False) -> None:
        self.checkpoint, self.stored, self.quantised = checkpoint, stored, packed
        self.tensors = {**checkpoint.stored.tensors, **stored.tensors}
        self.config: Mapping[str, Any] = formats.read_config(stored) or {}
        self.types = frozenset(view.type for view in towers(self.config) if not out_in)
        self.hand = parallel.by_hand(rules, self.tensors)
        self.packed = {piece.tensor: (one, n) for one in checkpoint.projections for n, piece in enumerate(one.pieces)
                       if not one.source.startswith(BY_RECORD) or not self._in_blocks(piece.tensor)}  # fmt: skip
        self.stamps = stamped(stored.files)
        weights = [(name, one) for name, (one, _) in self.packed.items() if len(self.tensors[name].shape) == 2]
        self.outputs = {name.rsplit(".", 2)[0]: one.axis for name, one in weights if name.count(".") > 1}
        self.cuts: dict[str, tuple[Cut | None, str] | None] = {}

    def _in_blocks(self, name: str) -> bool:
        """Whether a tensor scales blocks of rows of another, with which it goes whatever heads they are of."""
        base = next((name.removesuffix(tail) for tail in SCALES if name.endswith(tail)), "")
        return base in self.tensors and self.tensors[base].shape[:1] != self.tensors[name].shape[:1]

    def all(self) -> Iterator[Whole]:
        unsaid = [name for name in self.stored.tensors if self.cut(name) is None]
        if unsaid:
            raise self._refusal(unsaid)
        for tensor in self.stored.tensors.values():
            cut, why = self.cuts[tensor.name] or (None, "")
            told = self.stamps.get(tensor.name)
            if tensor.name in self.packed and cut is not None and told is None:
                one, n = self.packed[tensor.name]
                told = stamp_of(one, one.pieces[n], one.pieces, one.sizes)
            yield Whole(tensor.name, tensor.file, tensor.dtype, tensor.shape, cut, told, why)

    def _refusal(self, unsaid: list[str]) -> PlanError:
        pack = self.quantised.packs.get(unsaid[0])
        name = pack.base if pack else unsaid[0]
        more = f"  and {len(unsaid) - 1} more" if len(unsaid) > 1 else ""
        tensor = self.tensors[name]
        if CONTRADICTED in self.checkpoint.unknown.get(name, ""):
            return refusal(self.checkpoint)
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
        if pack := self.quantised.packs.get(name):
            decided = self.cut(pack.base)
            return decided and (cut_of_pack(name, pack, decided[0], self.tensors, self.quantised), f"packed numbers of {pack.base}")
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
        if packed.kind == "mlp" or set(base_names(packed.layout)) == {"gate", "up"}:
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
        rows, dims = base.shape[cut.axis], len(tensor.shape)
        if dims != len(base.shape):  # one for each row, or for each expert
            if tensor.shape != base.shape[:dims] or (dims > 1 and tensor.shape[-1] == base.shape[-1]):
                raise PlanError("scales do not fit the tensor that they scale", tensor=tensor.name, found=tensor.shape,
                                expected=f"those of the first axes of {base.name} {base.shape}")  # fmt: skip
            return (cut, why) if cut.axis < dims else (None, why)
        here = tensor.shape[cut.axis]
        if here == rows:
            return cut, why
        if here == 1:
            return None, why
        group = group_of(self.config, base) if cut.axis == len(base.shape) - 1 else None
        if group and here * group == rows:
            return Cut(cut.role, cut.axis, cut.layout, cut.sizes, group, rows), why
        block = block_of(self.config, cut.axis - len(base.shape)) or BLOCK
        for period in dict.fromkeys((rows, *([rows // cut.sizes["t"]] if "t" in cut.sizes else []))):
            if here == rows // period * -(-period // block):
                return Cut(cut.role, cut.axis, cut.layout, cut.sizes, block, period), why
        raise PlanError("scales do not fit the tensor that they scale", tensor=tensor.name, found=f"{here} for {rows} of {base.name}",
                        expected=f"1, {rows}, or {-(-rows // block)} for blocks of {block}")  # fmt: skip


def cut_of_pack(name: str, pack: Pack, whole: Cut | None, tensors: Mapping[str, Tensor], told: Quantised) -> Cut | None:
    """How a stored tensor is divided where its weight is divided by `whole`. Raises PlanError for inputs that were sorted."""
    weight, tensor = told.plain.tensors[pack.base], tensors[name]
    if whole is None:
        return None
    stem, _, word = name.rpartition(".")
    if whole.axis == IN and pack.base in told.sorted and word in GROUPED:
        raise PlanError(
            "inputs that were sorted by activation have their groups on all ranks", tensor=name,
            expected='"desc_act": false in quantization_config: then each run of inputs has its own groups',
            found=f"{told.sorted[pack.base]}, a group number for each of {weight.shape[IN]} inputs",
            try_="\n".join(f"--rule '{star(stem)}.{other}=copy' keeps all groups on every rank, as the numbers count them"
                           for other in GROUPED if f"{stem}.{other}" in tensors),
        )  # fmt: skip
    for axis, (of, block) in enumerate(pack.axes):
        for_all = of == IN and word in GROUPED and tensor.shape[axis] == 1  # one word for all is no scale for all: it is cut, or refused
        if of == whole.axis and not for_all:
            return replace(whole, axis=axis, block=block, period=weight.shape[of] if block > 1 else 0)
    return None
