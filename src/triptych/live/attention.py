"""`FusedAttention`: attention with a packed projection in any layout; `attend`: new queries against cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LayoutError, SizeError
from ..layout import Layout
from ..sizes import Sizes, bind
from ..tensors import Parts, split
from .kv_cache import KVCache
from .probe import Probed
from .project import project
from .rotary import pieces, rotary_of

Past = int | tuple[int, ...]
"""Position of the first token: one for all rows of the batch, or one a row."""


class FusedAttention(nn.Module):
    """Causal attention whose q, k and v come from one projection, in any layout of the language: MHA, GQA or MQA.

    Which dims turn with the position, and in which order their pairs stand, is read off the layout: `c p` is half-split, `p c`
    interleaved, `(rot c p|pass n)` partial. Runs on `F.scaled_dot_product_attention`. Without a cache gradients flow.

    Args:
        layout: the rows of the projection; its parts are q, k and v, or pieces of them (`q.rot`).
        hidden: features of the input and the output.
        bias, out_bias: of the projection, and of the output projection (as `bias` unless given).
        rotary: None as the layout says; for a layout that says only `d`, "half", "interleaved" or "partial half: first 16 of 64 dims";
            False for none.
        base: of the rotary angles.
        window: a token sees only the last `window` tokens, itself included.
        scale: of the scores, dim ** -0.5 unless given.
        layer: the layer of a `KVCache` that is this one's.
        device, dtype: of the parameters.
        sizes: any that determine the layout, such as h=32, g=8, d=128.

    `fused` is the projection [rows, hidden], `out` the output projection [hidden, heads * dims]. Its columns count the heads and dims of v
    as `split` does: where v itself is written `p c`, in the order of `c p`. A model whose v does not turn says so: `v d`.

    Decoding token by token, or in chunks of any size, gives what one run over all tokens gives, up to rounding: in float64 within 1e-12
    of the largest output.

    >>> _ = torch.manual_seed(0)
    >>> attention = FusedAttention("g (q r|k|v) c p", 24, g=2, r=3, p=4).double()
    >>> x, cache = torch.randn(1, 5, 24).double(), KVCache()
    >>> with torch.no_grad():
    ...     full = attention(x)
    ...     steps = torch.cat([attention(x[:, i : i + 1], cache) for i in range(5)], 1)
    >>> torch.allclose(full, steps, rtol=0, atol=1e-12)
    True

    Raises LayoutError (parts missing or unknown, a rotary order said twice), SizeError (heads or dims that do not fit each other).
    """

    def __init__(
        self,
        layout: Layout | str,
        hidden: int,
        *,
        bias: bool = True,
        out_bias: bool | None = None,
        rotary: str | bool | None = None,
        base: float = 10000.0,
        window: int | None = None,
        scale: float | None = None,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **sizes: int,
    ) -> None:
        super().__init__()
        self.layout = Layout(layout)
        self.sizes = bind(self.layout, **sizes)
        self.shapes = _shapes(self.layout, self.sizes)
        self.rotary = rotary_of(self.layout, self.sizes, rotary, base)
        self._given = Probed(self.layout, self.sizes, None, "")
        self._names = {part: _names(self.layout, self.sizes, part) for part in "qkv"}
        self.hidden, self.window, self.scale, self.layer = hidden, window, scale, layer
        heads, dims = self.shapes["q"][0], self.shapes["v"][1]
        self.fused: nn.Module = nn.Linear(hidden, self.layout.size(**_used(self.layout, self.sizes)), bias, device, dtype)
        self.out: nn.Module = nn.Linear(heads * dims, hidden, bias if out_bias is None else out_bias, device, dtype)

    @classmethod
    def around(
        cls,
        fused: nn.Module,
        layout: Layout | str | Probed,
        out: nn.Module | None = None,
        *,
        rotary: str | bool | None = None,
        base: float = 10000.0,
        window: int | None = None,
        scale: float | None = None,
        layer: int = 0,
        **sizes: int,
    ) -> FusedAttention:
        """The same around modules that exist: nothing is copied.

        Args:
            fused: the projection: an `nn.Linear` or a transformers `Conv1D`.
            layout: of its rows; or its entry of `probe(model)`, which knows the sizes and the rotary order too.
            out: the output projection; without it the heads come out side by side, [batch, tokens, heads * dims].
        Raises SizeError when the rows of `fused` do not fill the layout.

        >>> mha = nn.MultiheadAttention(12, 3, batch_first=True)
        >>> fused = nn.Linear(12, 36)
        >>> fused.weight, fused.bias = mha.in_proj_weight, mha.in_proj_bias
        >>> attention = FusedAttention.around(fused, "(q|k|v) h d", mha.out_proj, h=3)
        >>> x, later = torch.randn(2, 5, 12), torch.ones(5, 5).triu(1).bool()
        >>> torch.allclose(attention(x), mha(x, x, x, attn_mask=later)[0], atol=1e-6)
        True
        """
        if isinstance(layout, Probed):
            if layout.layout is None:
                raise LayoutError("probe found no layout", found=layout.note, try_="give the layout as text")
            rotary = rotary if rotary is not None else layout.rotary or False
            sizes = {**_used(layout.layout, layout.sizes), **sizes}
            layout = layout.layout
        rows, hidden = _features(fused)
        value = Layout(layout)
        found = _used(value, bind(value, rows=rows, **sizes))
        options = {"rotary": rotary, "base": base, "window": window, "scale": scale, "layer": layer}
        self = cls(value, hidden, bias=False, device="meta", **options, **found)  # type: ignore[arg-type]
        self.fused, self.out = fused, out if out is not None else nn.Identity()
        return self

    def extra_repr(self) -> str:
        return f"{self.layout}  {self.sizes.of(self.layout)}"

    def forward(self, x: Tensor, cache: KVCache | None = None, new: Sequence[int] | Tensor | None = None) -> Tensor:
        """Attend from every token of `x` to the tokens before it and to itself: [batch, tokens, hidden] -> [batch, tokens, hidden].

        Args:
            cache: holds the tokens before `x`; the new ones are appended to it.
            new: how many tokens of each row are real, where rows are padded at their end (see `KVCache.update`). The output of a padding
                token has no meaning.
        """
        past = self._past(cache, len(x))
        q, k, v = self.qkv(x, past)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        at = None
        if cache is not None:
            if not isinstance(past, int):
                first = cache[self.layer].first
                at = [n - first for n in past]
            k, v = cache.update(k, v, self.layer, new)
        mixed = attend(q.transpose(1, 2), k, v, at=at, window=self.window, scale=self.scale)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result

    def qkv(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of every token: [batch, tokens, hidden] -> [batch, tokens, heads, dims] each; q and k turned when `past` is given.

        Unturned parts are views of one projection where their rows allow it (see `split`).
        """
        self._check(x)
        found = split(self.fused(x), self.layout, **_used(self.layout, self.sizes))
        q, k, v = (self._joined(found, part) for part in "qkv")
        if self.rotary is None or past is None:
            return q, k, v
        return self.rotary(q, past), self.rotary(k, past), v

    def q_only(self, x: Tensor, past: Past | None = None) -> Tensor:
        """q alone, computed from its rows alone (see `project`): [batch, tokens, heads, dims]; turned when `past` is given."""
        q = project(self.fused, x, "q", self._given)
        return self.rotary(q, past) if self.rotary is not None and past is not None else q

    def kv_only(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """k and v alone, computed from their rows alone: [batch, tokens, kv heads, dims] each; k turned when `past` is given.

        `cache.update(*(part.transpose(1, 2) for part in kv_only(x, cache.length)))` fills a cache without attending.
        """
        k, v = project(self.fused, x, ("k", "v"), self._given)
        return (self.rotary(k, past) if self.rotary is not None and past is not None else k), v

    def _joined(self, found: Parts, part: str) -> Tensor:
        """A part of a split, its pieces side by side in row order."""
        tensors: list[Tensor] = [found[name] for name in self._names[part]]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)

    def _past(self, cache: KVCache | None, batch: int) -> Past:
        if cache is None:
            return 0
        layer = cache[self.layer]
        if layer.lengths and len(layer.lengths) != batch:
            raise SizeError("the input has another batch than the cache", expected=f"{len(layer.lengths)} rows", found=f"{batch} rows")
        kept = layer.options.window
        if kept is not None and (self.window is None or self.window > kept):
            raise SizeError(
                "the cache drops tokens that this attention sees",
                expected=f"window={self.window}" + (" or none" if self.window is not None else ""),
                found=f"KVCache(window={kept})",
            )
        return layer.length if layer.even else layer.lengths

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.hidden:
            raise SizeError("the input does not fit the attention", expected=f"[batch, tokens, {self.hidden}]", found=tuple(x.shape))


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, at: Sequence[int] | None = None, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Causal attention of the newest tokens over all tokens so far.

    Args:
        q: [batch, heads, tokens, dim]; query head j reads kv head j // (heads / kv heads).
        k, v: [batch, kv heads, columns, dim], as `KVCache.update` returns them; any strides, nothing is copied.
        at: the column of each row's first query, for rows of unequal lengths; without it the queries are the last columns.
        window: a query sees only the last `window` columns, its own included.
        scale: dim ** -0.5 unless given.
    Returns: a new tensor [batch, heads, tokens, dim of v].

    On a CPU one token's queries are laid out so that its kernel is fast: the query heads of a group become rows of one product, and a
    single bfloat16 row is doubled. Everything else, and every other device, is left to PyTorch's choice of kernel.
    """
    batch, heads, tokens, dim = q.shape
    groups, columns = k.shape[1], k.shape[2]
    if groups == 0 or heads % groups:
        raise SizeError("query heads must be a multiple of kv heads", found=f"{heads} query heads, {groups} kv heads")
    if window is not None and at is None and columns > window - 1 + tokens:  # older columns are seen by none
        first, columns = columns - (window - 1 + tokens), window - 1 + tokens
        k, v = k.narrow(2, first, columns), v.narrow(2, first, columns)
    whole = at is None and (window is None or window >= columns)
    causal = whole and tokens == columns and tokens > 1
    mask = None if causal or (whole and tokens == 1) else _visible(q, columns, at, window)
    if tokens > 1 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != groups)
    rows = q.reshape(batch, groups, heads // groups, dim)
    if heads == groups and q.dtype == torch.bfloat16:  # the kernel for one row is three times slower than the one for two
        return F.scaled_dot_product_attention(rows.repeat(1, 1, 2, 1), k, v, attn_mask=mask, scale=scale).narrow(2, 0, 1)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).reshape(batch, heads, 1, v.shape[3])


def _visible(q: Tensor, columns: int, at: Sequence[int] | None, window: int | None) -> Tensor:
    """Which column each query sees: bool [1, 1, tokens, columns], or [batch, 1, tokens, columns] with `at`."""
    tokens = q.shape[2]
    first = torch.tensor(at, device=q.device)[:, None, None, None] if at is not None else columns - tokens
    place = torch.arange(tokens, device=q.device)[:, None] + first
    column = torch.arange(columns, device=q.device)
    seen = column <= place
    if window is not None:
        seen &= column > place - window
    return seen if at is not None else seen[None, None]


def _shapes(layout: Layout, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """(heads, dims) of q, k and v. Raises LayoutError for other parts, SizeError for shapes that cannot attend to each other."""
    known = {name for part in "qkv" for piece in pieces(layout, sizes, part) for name in piece.path.names}
    found = {part: pieces(layout, sizes, part) for part in "qkv"}
    if set(layout.parts) - known or not all(found.values()):
        raise LayoutError("attention needs the parts q, k and v, and no others", layout=str(layout), found=", ".join(layout.parts))
    shapes = {part: (each[0].shape[0], sum(piece.shape[1] for piece in each)) for part, each in found.items()}
    q, k, v = shapes["q"], shapes["k"], shapes["v"]
    uneven = any(len({piece.shape[0] for piece in each}) > 1 for each in found.values())
    if uneven or k[0] != v[0] or q[0] % k[0] or q[1] != k[1]:
        text = ", ".join(f"{part} {heads} x {dims}" for part, (heads, dims) in shapes.items())
        raise SizeError(
            "q, k and v do not fit each other",
            layout=f"{layout} with {sizes.of(layout)}",
            expected="heads of q a multiple of those of k and v, dims of q and k alike",
            found=text + " (heads x dims)",
        )
    return shapes


def _features(fused: nn.Module) -> tuple[int, int]:
    """(rows, hidden) of a projection."""
    rows, hidden = getattr(fused, "out_features", None), getattr(fused, "in_features", None)
    weight = getattr(fused, "weight", None)
    if rows is None and isinstance(weight, Tensor) and weight.dim() == 2:
        hidden, rows = weight.shape  # Conv1D
    if not isinstance(rows, int) or not isinstance(hidden, int):
        raise LayoutError("not a projection", expected="an nn.Linear or a transformers Conv1D", found=type(fused).__name__)
    return rows, hidden


def _names(layout: Layout, sizes: Sizes, part: str) -> tuple[str, ...]:
    """The names by which `split` knows the pieces of a part."""
    return tuple(next(n for n in p.path.names if n == part or n.startswith(part + ".")) for p in pieces(layout, sizes, part))


def _used(layout: Layout, sizes: Sizes) -> dict[str, int]:
    return {axis: sizes[axis] for axis in layout.axes}
