"""Attention over a packed projection: against an oracle that reads the slow listing, against transformers' own modules, and in pieces."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import triptych as tt
from triptych.live.attention import FusedAttention, attend
from triptych.live.kv_cache import KVCache
from triptych.live.rotary import rotary_of

from .strategies import GQA, MHA, PARTIAL, bound_sizes, sizes_for

SHARED = ["(q h|k=v g) d", "t (q n r|k=v n) c p"]
LAYOUTS = [*MHA, *GQA, *PARTIAL, *SHARED]
HIDDEN = 7
EXACT = 1e-12
"""In float64, of the largest output: what decoding in pieces may differ by from one run over all tokens."""


def turned(x: np.ndarray, pairs: list[tuple[int, int]], base: float) -> np.ndarray:
    """Rotary position by complex numbers: [tokens, heads, dims]."""
    out = x.copy()
    for i, (a, b) in enumerate(pairs):
        angle = np.arange(len(x)) * base ** (-i / len(pairs))
        z = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angle)[:, None]
        out[..., a], out[..., b] = z.real, z.imag
    return out


def pairs_of(layout: tt.Layout, sizes: dict[str, int], rotary: object, dims: int) -> list[tuple[int, int]]:
    """Which dims turn together; found from the text of the layout."""
    if rotary is False:
        return []
    if rotary == "half":
        return [(i, dims // 2 + i) for i in range(dims // 2)]
    if rotary == "interleaved":
        return [(2 * i, 2 * i + 1) for i in range(dims // 2)]
    text, p = str(layout), sizes.get("p", 0)
    if "c" not in layout.axes:
        return []
    first = dims - 2 * p if "(pass" in text else 0
    return [(first + i, first + p + i) for i in range(p)]


def oracle(
    attention: FusedAttention, x: Tensor, sizes: dict[str, int], rotary: object, window: int | None, scale: float | None = None
) -> Tensor:
    """One sequence [tokens, hidden], in NumPy, row by row of the slow listing; every query by itself."""
    layout = attention.layout
    packed = (x @ attention.fused.weight.T + attention.fused.bias).detach().numpy()
    heads: dict[str, dict[int, list[tuple[int, np.ndarray]]]] = {}
    names = {path.names[0]: path.names for path in layout.paths}
    width: dict[str, int] = {}
    for row, column in zip(layout.rows(**{a: sizes[a] for a in layout.axes}), packed.T, strict=True):
        width[row.part] = max(width.get(row.part, 0), row.dim + 1)
        heads.setdefault(row.part, {}).setdefault(row.head, []).append((row.dim, column))
    parts = {}
    for part in "qkv":
        found = [path.names[0] for path in layout.paths if any(n.split(".")[0] == part for n in names[path.names[0]])]
        grid = [
            np.stack([np.stack([c for _, c in sorted(heads[name][h], key=lambda e: e[0])]) for h in sorted(heads[name])]) for name in found
        ]
        parts[part] = np.concatenate(grid, 1).transpose(2, 0, 1)  # [tokens, heads, dims]
    q, k, v = parts["q"], parts["k"], parts["v"]
    pairs = pairs_of(layout, sizes, rotary, q.shape[-1])
    q, k = turned(q, pairs, 10000.0), turned(k, pairs, 10000.0)
    ratio = q.shape[1] // k.shape[1]
    out = np.zeros((len(x), q.shape[1], v.shape[-1]))
    for i in range(len(x)):
        low = 0 if window is None else max(0, i + 1 - window)
        for head in range(q.shape[1]):
            scores = k[low : i + 1, head // ratio] @ q[i, head] * (scale or 1 / math.sqrt(q.shape[-1]))
            weight = np.exp(scores - scores.max())
            out[i, head] = weight / weight.sum() @ v[low : i + 1, head // ratio]
    flat = torch.from_numpy(out).flatten(1)
    return (flat @ attention.out.weight.T + attention.out.bias).detach()


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=0, atol=EXACT * max(1.0, float(theirs.abs().max())))


def test_sizes_hide_no_error() -> None:
    for text in LAYOUTS:
        sizes = sizes_for(tt.Layout(text), t=1, n=2, r=3, p=4)
        attention = FusedAttention(text, HIDDEN, **sizes)
        shapes = [attention.shapes["q"][0], attention.shapes["q"][1], HIDDEN]
        assert len(set(shapes)) == 3, text
    assert {"c p", "p c", "rot"} <= {mark for mark in ("c p", "p c", "rot") for text in LAYOUTS if mark in text}


@pytest.mark.parametrize("text", LAYOUTS)
def test_one_run_equals_the_oracle(text: str) -> None:
    torch.manual_seed(1)
    sizes = sizes_for(tt.Layout(text), t=2, n=1, r=3, p=5)
    attention = FusedAttention(text, HIDDEN, **sizes).double()
    x = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    result = attention(x)
    for row in range(2):
        assert close(result[row].detach(), oracle(attention, x[row], sizes, None, None))


class Run:
    """Rows of a batch that grow, shrink and change places; what was put out for every token that is still there."""

    def __init__(self, attention: FusedAttention, cache: KVCache, batch: int) -> None:
        self.attention, self.cache = attention, cache
        self.tokens: list[list[Tensor]] = [[] for _ in range(batch)]
        self.out: list[list[Tensor]] = [[] for _ in range(batch)]

    def append(self, counts: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(self.tokens), max(counts), HIDDEN, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            result = self.attention(x, self.cache, None if len(set(counts)) == 1 else counts)
        for row, count in enumerate(counts):
            self.tokens[row] += x[row, :count].unbind()
            self.out[row] += result[row, :count].unbind()

    def rollback(self, counts: list[int]) -> None:
        counts = [min(count, len(row)) for count, row in zip(counts, self.tokens, strict=True)]
        self.cache.rollback(counts)
        for count, *rows in zip(counts, self.tokens, self.out, strict=True):
            for row in rows:
                del row[len(row) - count :]

    def reorder(self, order: list[int]) -> None:
        self.cache.reorder(order)
        self.tokens, self.out = [[*self.tokens[i]] for i in order], [[*self.out[i]] for i in order]


@st.composite
def runs(draw: st.DrawFn) -> Iterator[tuple[object, ...]]:
    text = draw(st.sampled_from(LAYOUTS))
    layout = tt.Layout(text)
    sizes = draw(bound_sizes(layout))
    rotary = draw(st.sampled_from([None, False] if "c" in layout.axes else [None, "half", "interleaved"]))
    window = draw(st.sampled_from([None, None, 1, 2, 3, 5]))
    batch, even = draw(st.integers(1, 3)), draw(st.booleans())
    spare = draw(st.integers(0, 3))
    keeps = draw(st.sampled_from([None, window, (window or 1) + 2])) if window is not None else None
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["append", "append", "append", "rollback", "reorder"])) if steps else "append"
        if kind == "reorder":
            steps.append((kind, draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))))
            continue
        most = 5 if kind == "append" else spare if keeps is not None else 4
        counts = [draw(st.integers(0, most)) for _ in range(1 if even else batch)]
        counts = counts * (batch if even else 1)
        if kind == "append" and max(counts) == 0:
            counts[-1:] = [1]
            counts = [1] * batch if even else counts
        steps.append((kind, counts))
    return text, sizes, rotary, window, batch, KVCache(draw(st.integers(1, 9)), window=keeps, spare=spare), steps, draw(st.integers(0, 9))


@settings(max_examples=max(500, settings().max_examples))
@given(runs())
def test_in_pieces_equals_one_run(case: tuple) -> None:
    text, sizes, rotary, window, batch, cache, steps, seed = case
    torch.manual_seed(seed)
    attention = FusedAttention(text, HIDDEN, rotary=rotary, window=window, dtype=torch.float64, **sizes)
    run = Run(attention, cache, batch)
    for number, (kind, counts) in enumerate(steps):
        if kind == "append":
            run.append(counts, seed + 100 * number)
        elif kind == "rollback":
            run.rollback(counts)
        else:
            run.reorder(counts)
        assert cache.lengths == tuple(len(row) for row in run.tokens)
    for tokens, out in zip(run.tokens, run.out, strict=True):
        if tokens:
            with torch.no_grad():
                assert close(torch.stack(out), attention(torch.stack(tokens)[None])[0])
    longest = max(run.tokens, key=len)
    if longest:
        row = run.tokens.index(longest)
        assert close(torch.stack(run.out[row]), oracle(attention, torch.stack(longest), sizes, rotary, window))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("heads", [{"g": 2, "r": 3}, {"g": 5, "r": 1}])
def test_other_dtypes_within_a_bound(dtype: torch.dtype, bound: float, heads: dict[str, int]) -> None:
    torch.manual_seed(2)
    attention = FusedAttention("g (q r|k|v) c p", 32, p=8, dtype=dtype, **heads)
    x, cache = torch.randn(2, 40, 32, dtype=dtype), KVCache(7)
    with torch.no_grad():
        full = attention(x)
        pieces = [attention(piece, cache) for piece in x.split([11, 1, 1, 5, 1, 20, 1], 1)]
    assert (torch.cat(pieces, 1) - full).abs().max() <= bound * full.abs().max()


def neox() -> tuple[nn.Module, str, str, str, dict[str, int]]:
    config = transformers.GPTNeoXConfig(
        vocab_size=53, hidden_size=60, num_hidden_layers=1, num_attention_heads=5, intermediate_size=16, rotary_pct=0.5
    )
    model = transformers.GPTNeoXForCausalLM(config)
    return (
        model,
        "gpt_neox.layers.0.attention",
        "query_key_value",
        "dense",
        {"layout": "h (q|k|v) (rot c p|pass n)", "h": 5, "p": 3, "n": 6},
    )


def codegen() -> tuple[nn.Module, str, str, str, dict[str, int]]:
    config = transformers.CodeGenConfig(
        vocab_size=53, n_embd=160, n_layer=1, n_head=16, rotary_dim=6, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = transformers.CodeGenForCausalLM(config)
    layout = "m (q n (rot p c|pass u)|v n dv|k n (rot p c|pass u))"  # v does not turn: its dims stand as they count
    sizes = {"layout": layout, "m": 4, "n": 4, "p": 3, "u": 4, "dv": 10}
    return model, "transformer.h.0.attn", "qkv_proj", "out_proj", sizes


def falcon() -> tuple[nn.Module, str, str, str, dict[str, int]]:
    config = transformers.FalconConfig(
        vocab_size=53, hidden_size=60, num_hidden_layers=1, num_attention_heads=6, num_kv_heads=2, new_decoder_architecture=True, bias=True
    )
    return transformers.FalconForCausalLM(config), "transformer.h.0.self_attention", "query_key_value", "dense", {
        "layout": "g (q r|k|v) c p", "g": 2, "r": 3, "p": 5
    }  # fmt: skip


def phi3() -> tuple[nn.Module, str, str, str, dict[str, int]]:
    config = transformers.Phi3Config(
        vocab_size=53, hidden_size=60, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=3, intermediate_size=16,
        pad_token_id=0, sliding_window=4,
    )  # fmt: skip
    sizes = {"layout": "(q h|k g|v g) c p", "h": 6, "g": 3, "p": 5, "window": 4}
    return transformers.Phi3ForCausalLM(config), "model.layers.0.self_attn", "qkv_proj", "o_proj", sizes


@pytest.mark.parametrize("family", [neox, codegen, falcon, phi3])
def test_equals_the_module_of_transformers(family: object) -> None:
    torch.manual_seed(3)
    model, name, fused, out, said = family()
    theirs = model.double().eval().get_submodule(name)
    seen = {}
    theirs.register_forward_hook(
        lambda module, args, kwargs, result: seen.update(x=kwargs.get("hidden_states", args[0] if args else None), y=result[0]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(torch.randint(0, 53, (2, 9)))
        ours = FusedAttention.around(getattr(theirs, fused), out=getattr(theirs, out), **said)
        one_run, cache = ours(seen["x"]), KVCache(2)
        pieces = torch.cat([ours(piece, cache) for piece in seen["x"].split([4, 1, 3, 1], 1)], 1)
    assert torch.allclose(one_run, seen["y"], rtol=0, atol=1e-6), "their angles are float32"
    assert close(pieces, one_run)
    assert ours.fused is getattr(theirs, fused), "nothing is copied"
    probed = tt.probe(model)[f"{name}.{fused}"]
    with torch.no_grad():
        by_probe = FusedAttention.around(getattr(theirs, fused), probed, getattr(theirs, out), window=said.get("window"))
        assert torch.allclose(by_probe(seen["x"]), seen["y"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", LAYOUTS)
def test_parts_alone_equal_the_parts_of_all(text: str) -> None:
    torch.manual_seed(4)
    sizes = sizes_for(tt.Layout(text), t=2, n=1, r=3, p=5)
    attention = FusedAttention(text, HIDDEN, dtype=torch.float64, **sizes)
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    for past in (None, 4, (0, 6)):
        q, k, v = attention.qkv(x, past)
        assert close(attention.q_only(x, past).detach(), q.detach())
        assert all(close(ours.detach(), theirs.detach()) for ours, theirs in zip(attention.kv_only(x, past), (k, v), strict=True))


def test_q_only_attends_to_a_cache_filled_by_kv_only() -> None:
    torch.manual_seed(5)
    attention = FusedAttention("g (q r|k|v) p c", 24, g=2, r=3, p=2, dtype=torch.float64)
    x, cache = torch.randn(2, 6, 24, dtype=torch.float64), KVCache()
    with torch.no_grad():
        keys, values = cache.update(*(part.transpose(1, 2) for part in attention.kv_only(x, cache.length)))
        mixed = attend(attention.q_only(x[:, 5:], 5).transpose(1, 2), keys, values)
        assert close(attention.out(mixed.transpose(1, 2).flatten(2)), attention(x)[:, 5:])


@pytest.mark.parametrize("text", [text for text in LAYOUTS if "c" not in tt.Layout(text).axes])
def test_probe_reads_the_layout_off_the_run(text: str) -> None:
    sizes = sizes_for(tt.Layout(text), t=2, n=1, r=3, p=5)
    found = tt.probe(FusedAttention(text, HIDDEN, **sizes))["fused"]
    assert found.layout is not None
    assert found.layout.rows(**{axis: found.sizes[axis] for axis in found.layout.axes}) == tt.Layout(text).rows(**sizes)


def test_another_batch_than_the_cache_is_refused() -> None:
    attention, cache = FusedAttention("h (q|k|v) c p", 12, h=3, p=2), KVCache()
    attention(torch.zeros(2, 3, 12), cache, new=[3, 1])
    with pytest.raises(tt.SizeError, match="another batch than the cache\n  expected 2 rows\n  found    3 rows"):
        attention(torch.zeros(3, 1, 12), cache)


def test_gradients_and_state_dict() -> None:
    torch.manual_seed(6)
    attention = FusedAttention("h (q|k|v) c p", 12, h=3, p=2, window=3).double()
    x = torch.randn(1, 5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (x,))
    twin = FusedAttention("h (q|k|v) c p", 12, h=3, p=2, window=3).double()
    twin.load_state_dict(attention.state_dict())
    assert sorted(twin.state_dict()) == ["fused.bias", "fused.weight", "out.bias", "out.weight"]
    assert torch.equal(twin(x), attention(x))
    assert torch.equal(copy.deepcopy(attention)(x), attention(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (5, 5), (7, 1)])
def test_one_token_in_rows_of_a_group_is_what_sdpa_gives(dtype: torch.dtype, heads: int, groups: int) -> None:
    torch.manual_seed(7)
    q, k, v = torch.randn(2, heads, 1, 16), torch.randn(2, groups, 33, 16), torch.randn(2, groups, 33, 16)
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    ours = attend(q.to(dtype), k.to(dtype), v.to(dtype))
    assert (ours.double() - exact).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("build", "kind", "words"),
    [
        (lambda: FusedAttention("(gate|up) f", 8, f=4), tt.LayoutError, "needs the parts q, k and v"),
        (lambda: FusedAttention("h (q|k|v|gate) d", 8, h=2, d=4), tt.LayoutError, "and no others"),
        (lambda: FusedAttention("h (q dk|k dn|v dv)", 8, h=2, dk=3, dn=4, dv=5), tt.SizeError, "do not fit each other"),
        (lambda: FusedAttention("(q|k|v) h c p", 8, h=2, p=4, rotary="interleaved"), tt.LayoutError, "says another rotary order"),
        (lambda: FusedAttention("(q|k|v) h d", 8, h=2, d=3, rotary="half"), tt.LayoutError, "turn in pairs"),
        (lambda: FusedAttention("(q|k|v) h d", 8, h=2, d=4, rotary="neox"), tt.LayoutError, "no such rotary order"),
        (lambda: FusedAttention("(q|k|v) h d", 8, h=2, d=4, rotary="half or interleaved"), tt.LayoutError, "the same for 2 dims alone"),
        (lambda: FusedAttention("(q|k|v) h d", 8, h=2, d=8, rotary="partial half: first 4 of 9 dims"), tt.LayoutError, "first N of 8 dims"),
        (lambda: FusedAttention("h (q|k|v) (a c p|b c p)", 8, h=2, p=3), tt.LayoutError, "turn the same dims, in one piece"),
        (lambda: FusedAttention.around(nn.Linear(8, 23), "h (q|k|v) d", h=2, d=4), tt.SizeError, "rows do not fill"),
        (lambda: FusedAttention.around(nn.ReLU(), "h (q|k|v) d", h=2, d=4), tt.LayoutError, "not a projection"),
        (lambda: FusedAttention("h (q|k|v) d", 8, h=2, d=4)(torch.zeros(1, 2, 9)), tt.SizeError, "does not fit the attention"),
        (lambda: attend(torch.zeros(1, 3, 1, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)), tt.SizeError, "multiple of kv heads"),
        (
            lambda: FusedAttention("h (q|k|v) d", 8, h=2, d=4)(torch.zeros(1, 2, 8), KVCache(window=3)),
            tt.SizeError,
            "drops tokens that this attention sees",
        ),
    ],
)
def test_errors(build: object, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        build()


def test_two_dims_turn_alike_in_either_order() -> None:
    layout, sizes = tt.Layout("(q|k|v) h d"), tt.bind("(q|k|v) h d", h=2, d=8)
    x = torch.randn(1, 5, 2, 8)
    words = ["partial half or interleaved", "partial half", "partial interleaved"]
    turned = [rotary_of(layout, sizes, f"{order}: last 2 of 8 dims") for order in words]
    assert turned[0] == turned[1] and all(torch.equal(one(x, 3), turned[0](x, 3)) for one in turned)
