"""probe: the layout that the code executes, for real models, for models whose code was changed, and for modules that nobody knows."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families_report import same_rows
from triptych.errors import TraceError
from triptych.layout import Layout
from triptych.live.probe import Probed, probe
from triptych.sizes import bind

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SMALL = {"vocab_size": 50, "pad_token_id": 0, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 64}
GQA = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
"""6 query heads, 2 kv heads, ratio 3, head dim 8."""
MLA = {
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "hidden_size": 48,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
MIXED = {
    **GQA,
    "head_dim": 16,
    "moe_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "layer_types": ["linear_attention", "full_attention"],
}
SAM = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "image_size": 32,
    "patch_size": 8,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 30,
    "output_channels": 12,
}
VISION = {"depth": 1, "embed_dim": 24, "hidden_size": 24, "num_heads": 3, "patch_size": 4}

CASES: list[tuple[str, dict[str, Any], str, str, str, str | None]] = [
    ("gpt2", {"n_embd": 24, "n_head": 3, "n_layer": 1, "vocab_size": 50}, "attn.c_attn", "(q|k|v) h d", "h=3 d=8", None),
    (
        "gpt_neox",
        {**SMALL, "hidden_size": 48, "num_attention_heads": 3},
        "query_key_value",
        "h (q|k|v) d",
        "h=3 d=16",
        "partial half: first 4 of 16 dims",
    ),
    ("bloom", {"hidden_size": 24, "n_head": 3, "n_layer": 1, "vocab_size": 50}, "query_key_value", "h (q|k|v) d", "h=3 d=8", None),
    (
        "falcon",
        {**SMALL, "hidden_size": 48, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True},
        "query_key_value",
        "g (q r|k|v) d",
        "g=2 r=3 d=8",
        "half",
    ),
    (
        "falcon",
        {**SMALL, "hidden_size": 48, "num_attention_heads": 6, "multi_query": True},
        "query_key_value",
        "(q h|k g|v g) d",
        "h=6 d=8 g=1",
        "half",
    ),
    (
        "falcon",
        {**SMALL, "hidden_size": 48, "num_attention_heads": 6, "multi_query": False, "alibi": True},
        "query_key_value",
        "h (q|k|v) d",
        "h=6 d=8",
        None,
    ),
    (
        "codegen",
        {"n_embd": 96, "n_head": 12, "n_layer": 1, "rotary_dim": 4, "vocab_size": 50},
        "qkv_proj",
        "m (q|v|k) n d",
        "m=4 n=3 d=8",
        "partial interleaved: first 4 of 8 dims",
    ),
    (
        "codegen",
        {"n_embd": 96, "n_head": 12, "n_layer": 1, "rotary_dim": 2, "vocab_size": 50},
        "qkv_proj",
        "m (q|v|k) n d",
        "m=4 n=3 d=8",
        "partial half or interleaved: first 2 of 8 dims",
    ),
    ("phi3", {**SMALL, **GQA}, "qkv_proj", "(q h|k g|v g) d", "h=6 d=8 g=2", "half"),
    ("gpt_bigcode", {"n_embd": 24, "n_head": 3, "n_layer": 1, "vocab_size": 50}, "c_attn", "(q h|k g|v g) d", "h=3 d=8 g=1", None),
    (
        "gpt_bigcode",
        {"n_embd": 24, "n_head": 3, "n_layer": 1, "vocab_size": 50, "multi_query": False},
        "c_attn",
        "h (q|k|v) d",
        "h=3 d=8",
        None,
    ),
    (
        "persimmon",
        {**SMALL, "hidden_size": 48, "num_attention_heads": 3},
        "query_key_value",
        "h (q|k|v) d",
        "h=3 d=16",
        "partial half: first 8 of 16 dims",
    ),
    ("mpt", {"d_model": 24, "n_heads": 3, "n_layers": 1, "vocab_size": 50}, "Wqkv", "(q|k|v) h d", "h=3 d=8", None),
    ("modernbert", {**SMALL, "hidden_size": 24, "num_attention_heads": 3}, "Wqkv", "(q|k|v) h d", "h=3 d=8", "half"),
    (
        "deberta",
        {
            **SMALL,
            "hidden_size": 24,
            "num_attention_heads": 3,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "max_relative_positions": 9,
        },
        "in_proj",
        "h (q|k|v) d",
        "h=3 d=8",
        None,
    ),
    ("deepseek_v3", {**SMALL, **MLA}, "kv_a_proj_with_mqa", "latent dl|rope dr", "dl=10 dr=4", "interleaved"),
    ("deepseek_v3", {**SMALL, **MLA}, "kv_b_proj", "h (k dn|v dv)", "h=6 dn=5 dv=7", None),
    ("deepseek_v3", {**SMALL, **MLA}, "q_b_proj", "h (nope dn|rope dr)", "h=6 dn=5 dr=4", "interleaved"),
    ("qwen3_next", {**SMALL, **MIXED}, "in_proj_qkvz", "g (q dk|k dk|v r dv|z r dv)", "g=2 dk=5 r=3 dv=7", None),
    ("qwen3_next", {**SMALL, **MIXED}, "in_proj_ba", "g (b r|a r)", "g=2 r=3", None),
    ("qwen3_next", {**SMALL, **MIXED}, "conv1d", "q g dk|k g dk|v h dv", "g=2 dk=5 h=6 dv=7", None),
    ("qwen3_next", {**SMALL, **MIXED}, "q_proj", "h (q|gate) d", "h=6 d=16", "partial half: first 4 of 16 dims"),
    (
        "minimax",
        {**SMALL, **GQA, "num_local_experts": 2, "block_size": 4, "layer_types": ["linear_attention", "full_attention"]},
        "qkv_proj",
        "h (q|k|v) d",
        "h=6 d=8",
        None,
    ),
    (
        "mamba2",
        {
            "hidden_size": 24,
            "num_heads": 6,
            "head_dim": 8,
            "expand": 2,
            "n_groups": 2,
            "state_size": 5,
            "num_hidden_layers": 1,
            "vocab_size": 50,
        },
        "in_proj",
        "z h d|x h d|B g s|C g s|dt h",
        "h=6 d=8 g=2 s=5",
        None,
    ),
    (
        "mamba",
        {"hidden_size": 24, "expand": 2, "time_step_rank": 7, "state_size": 5, "num_hidden_layers": 1, "vocab_size": 50},
        "x_proj",
        "dt rank|B s|C s",
        "rank=7 s=5",
        None,
    ),
    ("sam_vision_model", SAM, "qkv", "(q|k|v) h d", "h=3 d=8", None),
    ("qwen2_vl_vision", VISION, "qkv", "(q|k|v) h d", "h=3 d=8", "half"),
    ("mistral4", {**SMALL, **MLA}, "gate_up_proj", "(gate|up) f", "f=20", None),
]


def ending(found: dict[str, Probed], name: str) -> Probed:
    return next(probed for key, probed in found.items() if key.endswith(name))


def tiny(name: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    from triptych.live.tiny import classes

    sizes = transformers.AutoConfig.for_model(name, **config)
    return classes(sizes)[0]._from_config(sizes).eval()


@functools.cache
def executed(name: str, config: str) -> dict[str, Probed]:
    return probe(tiny(name, **ast.literal_eval(config)))


@pytest.mark.parametrize(("name", "config", "tensor", "layout", "sizes", "rotary"), CASES, ids=[f"{c[0]} {c[2]} {c[3]}" for c in CASES])
def test_what_transformers_executes(name: str, config: dict[str, Any], tensor: str, layout: str, sizes: str, rotary: str | None) -> None:
    seen = ending(executed(name, repr(config)), tensor)
    assert str(seen.layout) == layout, seen.note
    assert (seen.sizes.of(Layout(layout)), seen.rotary, seen.note) == (sizes, rotary, "")


# code that was changed


def changed(function: Any, *edits: tuple[str, str]) -> Any:
    """The function with its text edited."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in edits:
        assert old in source, old
        source = source.replace(old, new)
    space: dict[str, Any] = {}
    exec(compile(source, "changed", "exec"), function.__globals__, space)
    return space[function.__name__]


CHANGES = [
    ("gpt_neox", "GPTNeoXAttention.forward", [("qkv.chunk(3, dim=-1)", "qkv.chunk(3, dim=-1)[::-1]")], "h (v|k|q) d"),
    (
        "gpt_neox",
        "GPTNeoXAttention.forward",
        [("query_states, key_states, value_states = qkv", "query_states, value_states, key_states = qkv")],
        "h (q|v|k) d",
    ),
    (
        "gpt_neox",
        "GPTNeoXAttention.forward",
        [
            ("self.query_key_value(hidden_states).view(hidden_shape).transpose(1, 2)", "self.query_key_value(hidden_states)"),
            ("qkv.chunk(3, dim=-1)", "(x.view(*input_shape, -1, self.head_size).transpose(1, 2) for x in qkv.chunk(3, dim=-1))"),
        ],
        "(q|k|v) h d",
    ),
    (
        "gpt_neox",
        "GPTNeoXAttention.forward",
        [(".view(hidden_shape).transpose(1, 2)", ".view(*input_shape, 3 * self.head_size, -1).transpose(2, 3).transpose(1, 2)")],
        "(q|k|v) d h",
    ),
    (
        "gpt_neox",
        "GPTNeoXAttention.forward",
        [("qkv.chunk(3, dim=-1)", "qkv.unflatten(-1, (-1, 3)).unbind(-1)")],
        "h d (q|k|v)",
    ),
    (
        "bloom",
        "BloomAttention._reshape",
        [("fused_qkv[..., 1, :]", "fused_qkv[..., 2, :]"), ("value_layer = fused_qkv[..., 2, :]", "value_layer = fused_qkv[..., 1, :]")],
        None,
    ),
    (
        "bloom",
        "BloomAttention._reshape",
        [("self.num_heads, 3, self.head_dim)", "3, self.num_heads, self.head_dim).transpose(2, 3)")],
        "(q|k|v) h d",
    ),
    (
        "falcon",
        "FalconAttention._split_heads",
        [("query = qkv[:, :, :, :-2]", "query = qkv[:, :, :, 2:]"), ("[-2]", "[0]"), ("[-1]", "[1]")],
        "g (k|v|q r) d",
    ),
    ("falcon", "FalconAttention._split_heads", [("[-2]", "[9]"), ("[-1]", "[-2]"), ("[9]", "[-1]")], "g (q r|v|k) d"),
    (
        "phi3",
        "Phi3Attention.forward",
        [
            ("qkv[..., :query_pos]", "qkv[..., -query_pos:]"),
            (
                "qkv[..., query_pos : query_pos + self.num_key_value_heads * self.head_dim]",
                "qkv[..., : self.num_key_value_heads * self.head_dim]",
            ),
            (
                "qkv[..., query_pos + self.num_key_value_heads * self.head_dim :]",
                "qkv[..., self.num_key_value_heads * self.head_dim : -query_pos]",
            ),
        ],
        "(k g|v g|q h) d",
    ),
    (
        "phi3",
        "Phi3Attention.forward",
        [
            (
                "query_states = query_states.view(hidden_shape)",
                "query_states = query_states.view(*input_shape, 3, 2, self.head_dim).transpose(2, 3).flatten(2, 3)",
            )
        ],
        "(q r g|k g|v g) d",
    ),
    (
        "phi3",
        "eager_attention_forward",
        [
            ("repeat_kv(key, module.num_key_value_groups)", "key.repeat(1, module.num_key_value_groups, 1, 1)"),
            ("repeat_kv(value, module.num_key_value_groups)", "value.repeat(1, module.num_key_value_groups, 1, 1)"),
        ],
        "(q r g|k g|v g) d",
    ),
    ("codegen", "CodeGenAttention.forward", [("query, value, key = torch.split", "query, key, value = torch.split")], "t (q|k|v) n d"),
    ("codegen", "CodeGenAttention.forward", [("mp_num = 4", "mp_num = 2")], "m (q|v|k) n d"),
]
FUSED = {"gpt_neox": "query_key_value", "bloom": "query_key_value", "falcon": "query_key_value", "phi3": "qkv_proj", "codegen": "qkv_proj"}


@pytest.mark.parametrize(("name", "where", "edits", "layout"), CHANGES, ids=[f"{c[0]} {c[3]} {i}" for i, c in enumerate(CHANGES)])
def test_changed_code_is_read_as_changed(
    name: str, where: str, edits: list[tuple[str, str]], layout: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = next(c[1] for c in CASES if c[0] == name)
    model = tiny(name, **config)
    before = ending(probe(model), FUSED[name])
    model.config._attn_implementation = "eager"
    home: Any = inspect.getmodule(type(model))
    *owner, function = where.split(".")
    place = getattr(home, owner[0]) if owner else home
    monkeypatch.setattr(place, function, changed(getattr(place, function), *edits))
    after = ending(probe(model), FUSED[name])
    assert str(after.layout) == (layout or "h (q|v|k) d"), after.note
    assert (after.layout, after.sizes) != (before.layout, before.sizes)


def test_query_heads_that_meet_the_wrong_keys_have_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt_neox", **next(c[1] for c in CASES if c[0] == "gpt_neox"))
    home: Any = inspect.getmodule(type(model))
    edit = (
        "qkv.chunk(3, dim=-1)",
        "qkv.chunk(3, dim=-1)\n    key_states = key_states[:, [1, 0, 2]]\n    value_states = value_states[:, [1, 0, 2]]",
    )
    source = textwrap.dedent(inspect.getsource(home.GPTNeoXAttention.forward))
    assert edit[0] in source
    monkeypatch.setattr(
        home.GPTNeoXAttention, "forward", changed(home.GPTNeoXAttention.forward, (edit[0], edit[1].replace("\n    ", "\n" + " " * 4)))
    )
    seen = ending(probe(model), "query_key_value")
    assert seen.layout is None and "no layout says where the rows went" in seen.note


# modules that nobody knows


class Own(nn.Module):
    """nanoGPT's attention, with q and k normalised."""

    def __init__(self, heads: int = 3, width: int = 24) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width), nn.RMSNorm(width // heads)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.c_attn(x).clamp(-8, 8).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in (self.q_norm(q), k, v))
        scores = (q @ self.k_norm(k).transpose(-2, -1)) / math.sqrt(q.size(-1))
        scores = torch.tanh(scores / 30) * 30
        y = scores.masked_fill(torch.ones(t, t).tril() == 0, float("-inf")).softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(b, t, c))


class Puzzle(nn.Module):
    """The question the project started from: q by the view, k and v by the weight's thirds or by the view."""

    def __init__(self, by_weight: bool) -> None:
        super().__init__()
        self.n_head, self.head_size, self.by_weight = 4, 8, by_weight
        self.query_key_value = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.n_head)
        if self.by_weight:
            weights, biases = self.query_key_value.weight.chunk(3), self.query_key_value.bias.chunk(3)
            q, k, v = (F.linear(x, w, b).view(*shape, self.head_size) for w, b in zip(weights, biases, strict=True))
        else:
            q, k, v = self.query_key_value(x).view(*shape, 3 * self.head_size).split(self.head_size, dim=-1)
        return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))


def test_a_users_own_module() -> None:
    assert str(probe(Own())["c_attn"].layout) == "(q|k|v) h d"


@pytest.mark.parametrize(("by_weight", "layout"), [(True, "(q|k|v) h d"), (False, "h (q|k|v) d")])
def test_the_puzzle(by_weight: bool, layout: str) -> None:
    seen = probe(Puzzle(by_weight))["query_key_value"]
    assert (str(seen.layout), seen.sizes["h"], seen.sizes["d"]) == (layout, 4, 8)


def test_torch_modules() -> None:
    assert str(probe(nn.MultiheadAttention(12, 3))["in_proj_weight"]) == "(q|k|v) h d  h=3 d=4"
    assert list(probe(nn.TransformerDecoderLayer(12, 3, 10, batch_first=True))) == [
        "multihead_attn.in_proj_weight",
        "self_attn.in_proj_weight",
    ]
    assert list(probe(nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 10), 2))) == [
        f"layers.{i}.self_attn.in_proj_weight" for i in range(2)
    ]


def test_grouped_query_attention_by_the_flag_of_torch() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(48, 80)

        def forward(self, x: Tensor) -> Tensor:
            y = self.qkv(x).view(*x.shape[:2], 2, 5, 8).permute(0, 2, 3, 1, 4)
            return F.scaled_dot_product_attention(y[:, :, :3].flatten(1, 2), y[:, :, 3], y[:, :, 4], enable_gqa=True)

    assert str(probe(Grouped())["qkv"]) == "g (q r|k|v) d  g=2 r=3 d=8"


def test_a_summary_beside_the_tokens_hides_nothing() -> None:
    class Summary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.summary = nn.Linear(12, 24), nn.Linear(12, 8), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).view(*x.shape[:2], 3, 8).transpose(1, 2)
            kv = torch.cat([self.kv(x), self.summary(x).mean(1, keepdim=True)], 1)[:, None]
            return (q @ kv.transpose(-1, -2)).softmax(-1) @ kv

    assert {name: str(seen) for name, seen in probe(Summary()).items()} == {"kv": "(k=v) f  f=8"}


def test_rows_that_reach_nothing_are_said() -> None:
    class Waste(Puzzle):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.query_key_value(x)[..., :48].view(*x.shape[:2], 2, 24).transpose(1, 2).split(8, dim=-1)
            return F.scaled_dot_product_attention(q, k, v)

    seen = probe(Waste(False))["query_key_value"]
    assert seen.layout is None and seen.note == "48 of 96 rows reach no attention"


@pytest.mark.parametrize("shift", [0, 8])
def test_a_bias_that_lies_otherwise_than_its_weight_is_said(shift: int) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(48, 96)

        def forward(self, x: Tensor) -> Tensor:
            mixed = F.linear(x, self.qkv.weight) + self.qkv.bias.roll(shift)
            q, k, v = mixed.view(*x.shape[:2], 4, 24).transpose(1, 2).split(8, dim=-1)
            return F.scaled_dot_product_attention(q, k, v)

    seen = probe(Shifted())["qkv"]
    assert str(seen.layout) == "h (q|k|v) d" and bool(seen.note) == bool(shift)


class Pointer(nn.Module):
    """Scores of pairs that weigh nothing."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(12, 16)
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.dense(x).view(*x.shape[:2], 2, 8).unbind(2)
        q, k = (k, q) if self.swapped else (q, k)
        return q @ k.transpose(-1, -2)


class Indexer(nn.Module):
    """Chooses tokens by the sum over 3 heads of weight * relu(q k), of which the first or last 4 of 10 dims are rotated."""

    def __init__(self, first: bool, added: bool) -> None:
        super().__init__()
        self.wq, self.wk, self.weigh = nn.Linear(12, 30), nn.Linear(12, 10), nn.Linear(12, 3)
        self.first, self.added = first, added

    def turned(self, y: Tensor) -> Tensor:
        """y [b, t, .., 10]"""
        parts = list(y.split([4, 6] if self.first else [6, 4], dim=-1))
        at = 0 if self.first else 1
        angle = torch.arange(y.shape[1]).view(1, -1, *[1] * (y.dim() - 2)) * torch.tensor([1.0, 0.3, 1.0, 0.3])
        a, b = parts[at].chunk(2, dim=-1)
        parts[at] = parts[at] * angle.cos() + torch.cat([-b, a], dim=-1) * angle.sin()
        return torch.cat(parts, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.turned(self.wq(x).view(*x.shape[:2], 3, 10)), self.turned(self.wk(x))
        scores = F.relu(q @ k.transpose(-1, -2).unsqueeze(1))
        weights = self.weigh(x)
        index = (scores * weights.unsqueeze(-1)).sum(2) if self.added else (weights.unsqueeze(-2) @ scores).squeeze(-2)
        return index.topk(2).indices


class LinearAttention(nn.Module):
    """softmax(q) over the tokens weighs k, and the sum multiplies v; q is one row."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.proj, self.order = nn.Conv2d(12, 13, 1), order

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(zip(self.order, self.proj(x).split([1 if part == "q" else 6 for part in self.order], dim=1), strict=True))
        context = (parts["k"] * parts["q"].softmax(-1)).sum(-1, keepdim=True)
        return F.relu(parts["v"]) * context.expand_as(parts["v"])


class Modulation(nn.Module):
    """Focal modulation with 3 gates, of which the last is for the mean."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(10, 23), nn.Conv2d(10, 10, 1)
        self.convolutions = nn.ModuleList(nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False) for _ in range(2))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        sizes = [3 if part == "gates" else 10 for part in self.order]
        parts = dict(zip(self.order, self.into(x).permute(0, 3, 1, 2).contiguous().split(sizes, dim=1), strict=True))
        q, context, gates = parts["q"], parts["ctx"], parts["gates"]
        total = torch.zeros(())
        for level, convolution in enumerate(self.convolutions):
            context = F.gelu(convolution(context))
            total = total + context * gates[:, level : level + 1]
        return q * self.out(total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, 2:])


@pytest.mark.parametrize("swapped", [False, True])
def test_a_pointer(swapped: bool) -> None:
    seen = probe(Pointer(swapped))["dense"]
    wanted = Layout("(k|q) d" if swapped else "(q|k) d")
    assert seen.layout is not None and same_rows(seen.layout, seen.sizes, wanted, bind(wanted, d=8))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("first", "layout"), [(True, "h (rope dr|nope d)"), (False, "h (nope d|rope dr)")])
def test_an_indexer(first: bool, layout: str, added: bool) -> None:
    found = probe(Indexer(first, added))
    assert list(found) == ["wq"] and found["wq"].rotary == "half"
    sizes = found["wq"].sizes
    rows = bind(layout, h=3, dr=4, d=6)
    assert found["wq"].layout is not None and same_rows(found["wq"].layout, sizes, Layout(layout), rows)


@pytest.mark.parametrize("order", ["qkv", "vqk", "kqv"])
def test_linear_attention_of_one_query_row(order: str) -> None:
    seen = probe(LinearAttention(order), torch.randn(1, 12, 2, 5))["proj"]
    wanted = Layout("|".join("q" if part == "q" else f"{part} d" for part in order))
    assert seen.layout is not None and same_rows(seen.layout, seen.sizes, wanted, bind(wanted, d=6))


@pytest.mark.parametrize("order", [["q", "ctx", "gates"], ["gates", "q", "ctx"], ["ctx", "gates", "q"]])
def test_focal_modulation(order: list[str]) -> None:
    seen = probe(Modulation(order), torch.randn(1, 8, 8, 10))["into"]
    wanted = Layout("|".join("gates l" if part == "gates" else f"{part} e" for part in order))
    assert seen.layout is not None and same_rows(seen.layout, seen.sizes, wanted, bind(wanted, e=10, l=3))


def test_scores_and_weights_of_another_head_have_no_layout() -> None:
    """Queries of which each meets both keys are no pointer's."""

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(12, 32)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.dense(x).view(*x.shape[:2], 2, 2, 8).unbind(2)
            return q.flatten(1, 2) @ k.flatten(1, 2).transpose(-1, -2)

    assert probe(Crossed()) == {}


def test_a_config_alone() -> None:
    config = transformers.GPTNeoXConfig(hidden_size=2560, num_attention_heads=32, num_hidden_layers=32)
    seen = ending(probe(config), "query_key_value")
    assert str(seen.layout) == "h (q|k|v) d"


# nothing is left behind


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("falcon", **CASES[3][1]).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    probe(model)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state()) and fast == torch.backends.mha.get_fastpath_enabled()


def test_functions_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_next", **SMALL, **MIXED)
    home: Any = inspect.getmodule(type(model))
    before = home.torch_chunk_gated_delta_rule
    monkeypatch.setattr(type(model), "forward", lambda self, **kwargs: 1 / 0)
    with pytest.raises(TraceError, match="the model cannot be run"):
        probe(model)
    assert home.torch_chunk_gated_delta_rule is before and torch.backends.mha.get_fastpath_enabled()


def test_a_model_without_data_is_refused() -> None:
    with pytest.raises(TraceError, match="meta device"):
        probe(nn.Linear(3, 9, device="meta"))
