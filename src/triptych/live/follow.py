"""Runs a model with labels beside the data: every element knows which row of which parameter produced it.

The labels follow an element through whatever keeps its place: views, copies, biases, norms, scaling, clipping, activations.
A product with a parameter starts new labels. What is multiplied by an exact zero is gone, so a rotation by the angle 0 changes nothing.
Written down on the way: attention (which rows meet which), rotations, gates, biases, and what feeds what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .labels import ACTIVE, KIND, MIX, OUT, ROW, SCORE, SCORE_HALF, STRONG, TOKEN, WEAK, Attention, Log, Scan, kind, reduce, row, token

ACTIVATIONS = frozenset(
    [
        "silu",
        "gelu",
        "relu",
        "sigmoid",
        "tanh",
        "elu",
        "leaky_relu",
        "hardswish",
        "hardsigmoid",
        "softplus",
        "mish",
        "log_sigmoid_forward",
        "relu6",
        "celu",
    ]
)
PRODUCTS = frozenset(("mul", "mul_"))
SUMS = frozenset(("add", "add_", "sub", "sub_", "rsub"))
MOVES = frozenset(
    [
        "cat",
        "stack",
        "index",
        "_unsafe_index",
        "index_select",
        "gather",
        "constant_pad_nd",
        "repeat",
        "roll",
        "flip",
        "slice_scatter",
        "select_scatter",
        "slice_backward",
        "take",
        "index_put",
        "index_put_",
        "index_copy",
        "index_copy_",
        "scatter",
        "scatter_",
        "im2col",
        "pixel_shuffle",
        "pixel_unshuffle",
        "tril",
        "triu",
        "tril_",
        "triu_",
        "reflection_pad1d",
        "reflection_pad2d",
        "replication_pad1d",
        "replication_pad2d",
        "where",
        "masked_select",
        "masked_scatter",
        "split_with_sizes_copy",
        "unfold_copy",
        "copy_",
        "zero_",
        "fill_",
        "repeat_interleave",
        "rot90",
        "channel_shuffle",
        "index_add_",
        "index_add",
    ]
)


@dataclass
class _Held:
    labels: Tensor
    storage: torch.UntypedStorage
    unit: int


class Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode. `params` maps a storage to the number of its first element, see `Registry`; `still` makes every sine 0 and cosine 1."""

    def __init__(self, params: Mapping[int, int], still: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.params = dict(params)
        self.still = still
        self.held: dict[int, _Held] = {}
        self.log = Log()
        self.outputs = 0
        self.blind = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.still and name in ("sin", "cos"):
            out = torch.zeros_like(out) if name == "sin" else torch.ones_like(out)
        elif not func.is_view and not self.blind:
            with torch.no_grad():
                self._record(name, func, args, kwargs or {}, out)
        return out

    # labels of a tensor

    def labels(self, tensor: Tensor) -> Tensor | None:
        """int64 labels of the tensor's shape (a complex tensor has a last axis of 2 more), or None when it has none."""
        if tensor.layout != torch.strided:
            return None
        key = tensor.untyped_storage()._cdata
        held = self.held.get(key)
        size, stride, offset, unit = _geometry(tensor)
        if held is not None:
            return held.labels.as_strided(size, stride, offset) if held.unit == unit else None
        first = self.params.get(key)
        if first is None:
            return None
        labels = torch.tensor((WEAK << KIND) + first + 1 + offset)
        for n, step in zip(size, stride, strict=True):
            labels = labels.unsqueeze(-1) + torch.arange(n) * step
        return labels

    def put(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Sets the labels of a tensor, as far as the storage under it is concerned."""
        if tensor.layout != torch.strided or tensor.numel() == 0:
            return
        storage = tensor.untyped_storage()
        held = self.held.get(storage._cdata)
        size, stride, offset, unit = _geometry(tensor)
        if held is None or held.unit != unit:
            if labels is None or storage._cdata in self.params:
                return
            held = self.held[storage._cdata] = _Held(torch.zeros(storage.nbytes() // unit, dtype=torch.int64), storage, unit)
        held.labels.as_strided(size, stride, offset).copy_(torch.zeros(()) if labels is None else labels)

    def _is_weak(self, tensor: Tensor) -> bool:
        key = tensor.untyped_storage()._cdata
        if key in self.held:
            labels = self.labels(tensor[(slice(0, 1),) * tensor.dim()])
            return labels is not None and bool((kind(labels) == WEAK).any())
        return key in self.params

    # rules

    def _record(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        tensors = [t for t in _flat((*args, *kwargs.values())) if isinstance(t, Tensor)]
        keys = [t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided]
        if not any(key in self.held or key in self.params for key in keys):
            return
        if isinstance(out, Tensor) and not name.endswith("_") and out.layout == torch.strided and out.untyped_storage()._cdata in keys:
            return
        rule: Callable[..., None] | None = _RULES.get(name)
        if rule is not None:
            rule(self, args, kwargs, out)
        elif name.startswith("_scaled_dot_product"):
            self.attention(args[0], args[1], args[2], out[0], True)
        elif name in MOVES:
            self._move(name, func, args, kwargs, out)
        elif isinstance(out, Tensor) and torch.Tag.pointwise in func.tags:
            self._pointwise(name, tensors, out)
        else:
            self._other(func, args, kwargs, tensors, out)

    def _move(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        def swap(value: Any) -> Any:
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                labels = self.labels(value)
                if labels is None:
                    return torch.zeros((*value.shape, *((2,) if value.is_complex() else ())), dtype=torch.int64)
                return labels.clone() if name.endswith("_") else labels
            if isinstance(value, (list, tuple)):
                return type(value)(map(swap, value))
            return value

        if name == "constant_pad_nd" and isinstance(out, Tensor):
            labels = self.labels(args[0])
            return self.put(out, None if labels is None or args[0].is_complex() else func(labels, args[1], 0))
        if name in ("zero_", "fill_") and isinstance(out, Tensor):
            return self.put(out, None)
        if not isinstance(out, (Tensor, list, tuple)) or (isinstance(out, Tensor) and not (out.is_floating_point() or out.is_complex())):
            return
        if name == "copy_" and isinstance(out, Tensor):
            source = self.labels(args[1])
            plain = args[0].is_complex() == args[1].is_complex()
            return self.put(out, source.expand(_geometry(out)[0]) if source is not None and plain else None)
        if name in ("where", "masked_scatter") and any(isinstance(t, Tensor) and t.is_complex() for t in args):
            return
        if name == "im2col" and isinstance(out, Tensor):  # for floating point alone: a label in two halves
            labels = self.labels(args[0])
            halves = [func(x.double(), *args[1:]).long() for x in (labels >> 32, labels & 0xFFFFFFFF)] if labels is not None else None
            return self.put(out, (halves[0] << 32) | halves[1] if halves is not None else None)
        moved = func(*map(swap, args), **{k: swap(v) for k, v in kwargs.items() if k != "dtype"})
        for tensor, labels in zip(_listed(out), _listed(moved), strict=True):
            self.put(tensor, labels)

    def _pointwise(self, name: str, tensors: list[Tensor], out: Tensor) -> None:
        if not (out.is_floating_point() or out.is_complex()):
            return
        name = name.rstrip("_") if name != "mul_" else name
        if any(t.is_complex() for t in (*tensors, out)):
            return self._complex(name, tensors, out)
        if name == "addcmul" and len(tensors) == 3:
            product, _ = self._combined("mul", tensors[1:], out)
            base = self.labels(tensors[0])
            sides = [(base.expand(out.shape) if base is not None else None, False), (product, False)]
            return self.put(out, self._fold("add", sides))
        labels, _ = self._combined(name, tensors, out)
        if labels is not None and name in ACTIVATIONS:
            labels = torch.where((labels > 0) & (kind(labels) == STRONG), labels | ACTIVE, labels)
        self.put(out, labels)

    def _combined(self, name: str, tensors: list[Tensor], out: Tensor) -> tuple[Tensor | None, bool]:
        """Labels of an elementwise result: of the one operand that has any, or by `_meet`."""
        if name == "masked_fill":
            tensors = tensors[:1]
        sides: list[tuple[Tensor | None, bool]] = []
        zeros = []
        for t in tensors:
            labels = self.labels(t)
            if (
                labels is not None
                and self._is_weak(t)
                and any(o.dim() and o is not t and not self._is_weak(o) and self.labels(o) is None for o in tensors)
            ):
                labels = None
            if labels is None and name in PRODUCTS and t.numel() > 1:
                zeros.append(t == 0)
            narrow = out.dim() > 0 and out.shape[-1] > 1 and (t.dim() == 0 or t.shape[-1] == 1)
            sides.append((None if labels is None else labels.expand(out.shape) if labels.dim() <= out.dim() else labels, narrow))
        result = self._fold(name, sides)
        for zero in zeros:
            if result is not None and bool(zero.any()):
                result = result.masked_fill(zero, 0)
        return result, False

    def _fold(self, name: str, sides: list[tuple[Tensor | None, bool]]) -> Tensor | None:
        result, narrow = None, False
        for labels, thin in sides:
            if labels is None:
                continue
            result, narrow = (labels, thin) if result is None else (self._meet(name, result, labels, narrow, thin), narrow and thin)
        return result

    def _meet(self, name: str, a: Tensor, b: Tensor, a_thin: bool, b_thin: bool) -> Tensor:
        """Where two labelled operands meet: scores and outputs win over rows, rows over parameters, the wide operand over the narrow."""
        ka, kb = kind(a), kind(b)
        both = (a > 0) & (b > 0)
        rows = both & (ka == STRONG) & (kb == STRONG)
        same = rows & (row(a) == row(b))
        differ = rows & ~same
        if name in PRODUCTS:
            for x, y, kx, ky in ((a, b, ka, kb), (b, a, kb, ka)):
                gate = both & (kx == STRONG) & (ky == OUT)
                if bool(gate.any()):
                    self.log.gates.append(torch.stack([row(x[gate]), y[gate] & ((1 << KIND) - 1)]))
            if bool(differ.any()):
                (self.log.products if a_thin == b_thin else self.log.spread).append(torch.stack([a[differ], b[differ]]))
        biased = both & (((ka == STRONG) & (kb == WEAK)) | ((ka == WEAK) & (kb == STRONG)))
        if name in SUMS and bool(biased.any()):
            strong = torch.where(ka == STRONG, a, b)[biased]
            self.log.biases.append(torch.stack([row(strong), row(torch.where(ka == WEAK, a, b)[biased])]))
        rank_a, rank_b = _rank(a, ka), _rank(b, kb)
        result = torch.where(rank_b > rank_a, b, a)
        result = torch.where(same & ((b & ACTIVE) != 0), a | ACTIVE, result)
        if bool(differ.any()) and a_thin != b_thin:
            return torch.where(differ, b if a_thin else a, result)
        if name in SUMS and bool(differ.any()):
            turned = differ & (token(a) == token(b)) & self._one_parameter(a, b)
            if bool(turned.any()):
                self.log.rotations.append(torch.stack([row(a[turned]), row(b[turned])]))
                result = torch.where(turned, MIX, result)
        return result

    def _one_parameter(self, a: Tensor, b: Tensor) -> Tensor:
        starts = torch.tensor(sorted(set(self.params.values())))
        numbers = [torch.searchsorted(starts, row(x).contiguous(), right=True) for x in (a, b)]
        return numbers[0] == numbers[1]

    def _complex(self, name: str, tensors: list[Tensor], out: Tensor) -> None:
        """Complex numbers carry two labels each; a factor without labels turns them where its imaginary part is not zero."""
        if name == "complex" and len(tensors) == 2:
            halves = [self.labels(t) for t in tensors]
            if halves[0] is not None and halves[1] is not None:
                self.put(out, torch.stack([halves[0], halves[1]], -1))
            return
        labelled = [t for t in tensors if self.labels(t) is not None]
        if len(labelled) != 1 or not labelled[0].is_complex() or not out.is_complex():
            return
        labels = self.labels(labelled[0])
        assert labels is not None
        labels = labels.expand(*out.shape, 2)
        factors = [t for t in tensors if t is not labelled[0] and t.is_complex()]
        if name in PRODUCTS and factors:
            turn = (factors[0].imag != 0).expand(out.shape)
            if bool(turn.any()):
                pairs = labels[turn]
                pairs = pairs[(pairs > 0).all(1)]
                self.log.rotations += [row(pairs).T, row(pairs.flip(1)).T]
            labels = torch.where(turn.unsqueeze(-1), MIX, labels)
        self.put(out, labels)

    def _other(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[Tensor], out: Any) -> None:
        """A reduction keeps a label that all its elements share; whatever else keeps the shape keeps the labels."""
        result = next((t for t in _listed(out) if isinstance(t, Tensor)), None)
        source = next((t for t in tensors if t.layout == torch.strided and self.labels(t) is not None), None)
        if result is None or source is None or not result.is_floating_point() or self._is_weak(source):
            return
        labels = self.labels(source)
        assert labels is not None
        if result.shape == labels.shape:
            return self.put(result, labels)
        bound = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
        if "dim" in bound and labels.dim():
            dims = [bound["dim"]] if isinstance(bound["dim"], int) else list(bound["dim"] or range(labels.dim()))
            reduced = reduce(labels, dims, keep=bool(bound.get("keepdim", False)))
            return self.put(result, reduced if reduced.shape == result.shape else None)
        if result.dim() == labels.dim() >= 3 and result.shape[:2] == labels.shape[:2]:
            one = reduce(labels, range(2, labels.dim()), keep=True)
            self.put(result, one.expand(result.shape))

    def softmax(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
        labels = self.labels(args[0])
        if labels is None:
            return
        scores = labels[(labels > 0) & (kind(labels) == SCORE)]
        for number in torch.unique((scores >> 44) & 0xFFF).tolist():
            self.log.attentions[number].softmax = True
        if not len(scores) and bool((strong := (labels > 0) & (kind(labels) == STRONG)).any()):
            self.log.softened.append(torch.unique(row(labels[strong])))
        self.put(out, labels)

    def strip(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
        """Rows looked up in a table are inputs."""

    def product(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
        bias, a, b = args[0] if len(args) > 2 else None, args[-2], args[-1]
        if a.is_complex() or b.is_complex():
            return
        if b.dim() == 1:
            a, b = a.unsqueeze(0) if a.dim() == 1 else a, b.unsqueeze(1)
        shape = (*a.shape[:-1], b.shape[-1])
        labels = self._contracted(a, b)
        if labels is None:
            return self.put(out, None)
        labels = labels.reshape(shape)
        other = self.labels(bias) if bias is not None else None
        if other is not None and other.numel():
            labels = self._meet("add", labels, other.expand(shape), False, False)
        self.put(out, labels.reshape(out.shape))

    def _contracted(self, a: Tensor, b: Tensor) -> Tensor | None:
        if 0 in a.shape or 0 in b.shape:
            return None
        a_weak, b_weak = self._is_weak(a), self._is_weak(b)
        if a_weak or b_weak:
            return self._projected(a, b, b_weak)
        la, lb = self.labels(a), self.labels(b)
        if la is None and lb is None:
            return None
        if la is None or lb is None:
            out_labels = reduce(la, [-1], keep=True) if la is not None else reduce(lb, [-2], keep=True) if lb is not None else None
            return None if out_labels is None else out_labels.expand(*a.shape[:-1], b.shape[-1])
        one = la.dim() == 2
        la, lb = (la.unsqueeze(0), lb.unsqueeze(0)) if one else (la, lb)
        scores = [bool(((x > 0) & (kind(x) == SCORE)).any()) for x in (la, lb)]
        if scores == [True, True]:
            return la if la.shape == (*la.shape[:-1], lb.shape[-1]) else None
        if scores[0]:
            return self._weighed(la, lb)
        if scores[1]:
            swapped = self._weighed(lb.transpose(1, 2), la.transpose(1, 2))
            return None if swapped is None else swapped.transpose(1, 2)
        return self._scored(la, lb.transpose(1, 2))

    def _projected(self, a: Tensor, b: Tensor, b_weak: bool) -> Tensor | None:
        """A product with a parameter: one new row for every line of it that is summed over."""
        weight, other = (b.transpose(-1, -2), a) if b_weak else (a, b.transpose(-1, -2))
        lines = self.labels(weight.select(-1, 0))
        assert lines is not None
        if weight.shape[-1] > 1:
            second = self.labels(weight.select(-1, 1))
            assert second is not None
            steps = torch.unique((second - lines)[lines > 0]).tolist()
            for first in self._starts(lines) if len(steps) == 1 else ():
                self.log.contracted.setdefault(first, abs(steps[0]))
        inputs = self.labels(other)
        shape = (*other.shape[:-1], weight.shape[-2])
        if inputs is not None:
            if bool(((inputs > 0) & (kind(inputs) == SCORE)).any()):
                same = inputs if b_weak else inputs.transpose(-1, -2)
                return same if same.shape == (*a.shape[:-1], b.shape[-1]) else None
            self._feeds(inputs, lines)
            self._closes(inputs, lines)
        count = math.prod(other.shape[:-1])
        places = torch.arange(count).reshape(*other.shape[:-1], 1) & 0xFFFF
        labels = torch.where(lines > 0, lines & ROW, 0).unsqueeze(-2).expand(shape) + (places << TOKEN)
        return labels if b_weak else labels.transpose(-1, -2)

    def _starts(self, lines: Tensor) -> Iterable[int]:
        """First line of each parameter in `lines`."""
        starts = torch.tensor(sorted(set(self.params.values())))
        numbers = torch.unique(torch.searchsorted(starts, row(lines[lines > 0]).reshape(-1), right=True) - 1)
        return [int(starts[n]) for n in numbers.tolist()]

    def _feeds(self, inputs: Tensor, lines: Tensor) -> None:
        vectors = inputs.reshape(-1, inputs.shape[-1])
        pure = ((vectors > 0) & (kind(vectors) == STRONG)).all(1)
        if bool(pure.any()):
            vector = row(vectors[int(pure.nonzero()[0])])
            for first in self._starts(lines):
                self.log.fed.setdefault(first, vector)

    def _closes(self, inputs: Tensor, lines: Tensor) -> None:
        vectors = torch.where((inputs > 0) & (kind(inputs) == OUT), inputs & ((1 << KIND) - 1), -1).reshape(-1, inputs.shape[-1])
        outs = (vectors >= 0).sum(1)
        if bool(outs.any()):
            for first in self._starts(lines):
                self.log.closing.setdefault(first, vectors[int(outs.argmax())])

    def _scored(self, q: Tensor, k: Tensor) -> Tensor | None:
        """q [b, m, d] and k [b, n, d] meet: the result [b, m, n] knows which vectors."""
        strong = [((x > 0) & (kind(x) == STRONG)).any() for x in (q, k)]
        if not all(map(bool, strong)) or len(self.log.attentions) > 0xFFF:
            self.log.unclear = self.log.unclear or any(bool((x == MIX).any()) for x in (q, k))
            return None
        number = len(self.log.attentions)
        self.log.attentions.append(Attention(q.clone(), k.clone()))
        of_q = torch.arange(q.shape[0] * q.shape[1]).view(q.shape[0], -1, 1) & SCORE_HALF
        of_k = torch.arange(k.shape[0] * k.shape[1]).view(k.shape[0], 1, -1) & SCORE_HALF
        return (SCORE << KIND) + (number << 44) + (of_q << 22) + of_k

    def _weighed(self, scores: Tensor, v: Tensor) -> Tensor | None:
        """Scores [b, i, j] weigh v [b, j, d]."""
        ours = (scores > 0) & (kind(scores) == SCORE)
        number = int(((scores[ours] >> 44) & 0xFFF)[0])
        ours &= ((scores >> 44) & 0xFFF) == number
        seen = self.log.attentions[number]
        if not bool(((v > 0) & (kind(v) == STRONG)).any()):
            return None
        of_q = torch.where(ours, (scores >> 22) & SCORE_HALF, -1)
        of_k = torch.where(ours, scores & SCORE_HALF, -1)
        over_k = not bool(((of_k.amax(-1, keepdim=True) != of_k) & ours).any()) and scores.shape[-1] > 1
        if over_k:
            of_q, of_k = of_k, of_q
        shape = (*scores.shape[:2], v.shape[-1])
        if seen.v is None:
            seen.v = v.clone()
            if over_k:
                seen.q, seen.k = seen.k, seen.q
            seen.q_of, seen.k_of = of_q.amax(2), of_k.amax(1)
            seen.out, seen.out_shape = self.outputs, shape
            seen.pairs = torch.stack([of_q[ours], of_k[ours]])
        return self._output(shape)

    def _output(self, shape: Sequence[int]) -> Tensor:
        labels = torch.arange(math.prod(shape)).reshape(tuple(shape)) + self.outputs + (OUT << KIND)
        self.outputs += math.prod(shape)
        return labels

    def attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax: bool, heads: int = 1, **others: Tensor) -> None:
        """A call that does the whole of attention, q, k, v [..., d] with an axis `heads`, or of a recurrence when there is no softmax.

        Of fewer heads each serves several others in a row. The vectors of `out` are those of q, in a recurrence those of v.
        """
        labels = [x.reshape(1, -1, x.shape[-1]).clone() for t in (q, k, v) if (x := self.labels(t)) is not None]
        if len(labels) < 3:
            return
        places = [
            torch.arange(math.prod(t.shape[:-1])).view(t.shape[:-1]).movedim(heads, 0).flatten(1)[:, :1].flatten().tolist()
            for t in (q, k, v)
        ]
        seen = Attention(labels[0], labels[1], labels[2], softmax=softmax, recurrent=not softmax)
        seen.pairs = torch.tensor([(i, places[1][n * len(places[1]) // len(places[0])]) for n, i in enumerate(places[0])]).T
        met = [-1] * math.prod(v.shape[:-1])
        for n, i in enumerate(places[2]):
            met[i] = places[1][n * len(places[1]) // len(places[2])]
        seen.k_of = torch.tensor([met])
        seen.q_of = torch.arange(math.prod(out.shape[:-1])).view(1, -1)
        seen.out, seen.out_shape = self.outputs, (1, math.prod(out.shape[:-1]), out.shape[-1])
        seen.others = {name: x for name, t in others.items() if (x := self.labels(t)) is not None}
        self.log.attentions.append(seen)
        self.put(out, self._output(out.shape))

    def scan(self, out: Tensor, operands: Mapping[str, Tensor]) -> None:
        """A state-space recurrence: x, z [batch, tokens, heads, dims], dt without dims; or x, z, dt [batch, dims, tokens]."""
        channels = out.dim() == 3
        found = {}
        for part, t in operands.items():
            labels = self.labels(t)
            if labels is None:
                continue
            if channels:
                labels = labels.transpose(1, 2) if t.shape[-1] == out.shape[-1] else labels
                labels = labels.unsqueeze(-2)
            elif part == "dt":
                labels = labels.unsqueeze(-1)
            found[part] = labels.reshape(-1, *labels.shape[-2:]).clone()
        self.log.scans.append(Scan(found, self.outputs, tuple(out.shape), channels))
        self.put(out, self._output(out.shape))

    def grouped(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
        """Tokens [n, in], each times the matrix of its expert, [experts, in, rows]; the rows of the first expert stand for all."""
        if not self._is_weak(args[1]) or args[1].dim() != 3:
            return
        labels = self._projected(args[0], args[1][0], True)
        self.put(out, labels)

    def convolution(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
        data, weight = args[0], args[1]
        inputs = self.labels(data)
        if not self._is_weak(weight):
            return
        transposed = bool(args[6]) if len(args) > 6 else False
        lines = self.labels(weight[:, 0].flatten(1)[:, 0] if not transposed else weight[0].flatten(1)[:, 0])
        assert lines is not None
        if inputs is not None and not transposed and weight.shape[1] == 1 and weight.shape[0] == data.shape[1] > 1:
            channels = reduce(inputs, [0, *range(2, inputs.dim())], keep=True)
            if bool((channels > 0).any()):
                self.log.mixed[next(iter(self._starts(lines)))] = (row(channels.flatten()), row(lines))
                return self.put(out, channels.expand(out.shape))
        if transposed or lines.shape[0] != out.shape[1]:
            return
        if inputs is not None and all(n == 1 for n in weight.shape[2:]):
            self._feeds(inputs.movedim(1, -1), lines)
        places = torch.arange(out.numel() // out.shape[1]).view(out.shape[0], 1, *out.shape[2:]) & 0xFFFF
        self.put(out, row(lines).view(1, -1, *([1] * (out.dim() - 2))) + 1 + (places << TOKEN))


_RULES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "addmm_", "baddbmm_"), Follow.product),
    **dict.fromkeys(("_grouped_mm", "grouped_mm"), Follow.grouped),
    **dict.fromkeys(("_softmax", "_safe_softmax", "softmax"), Follow.softmax),
    **dict.fromkeys(("embedding", "_embedding_bag"), Follow.strip),
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution"), Follow.convolution),
}


def _rank(labels: Tensor, kinds: Tensor) -> Tensor:
    """none < parameter < mixture < row < attention output < score."""
    order = torch.tensor([3, 4, 5, 1])
    return torch.where(labels > 0, order[kinds.clamp(0, 3)], torch.where(labels < 0, 2, 0))


def _geometry(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Size, stride, offset and bytes in units of real numbers."""
    if tensor.is_complex():
        return (*tensor.shape, 2), (*(2 * s for s in tensor.stride()), 1), 2 * int(tensor.storage_offset()), tensor.element_size() // 2
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.element_size()


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
