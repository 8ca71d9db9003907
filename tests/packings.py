"""Every distinct packing met in the field: its expression, small sizes, and its rows written out by hand.

The listings are an oracle: they are written from the models' code and share nothing with the layout language.
`q:0-2.0-4` stands for heads 0 to 2 of q, each with its dims 0 to 4, dims fastest; `:0.0` is row 0 of a tensor that has one part only.
"""

from __future__ import annotations

from typing import NamedTuple


class Packing(NamedTuple):
    """`number` and `who` as in the census; `axis` is the packed axis of the stored tensor of `ndim` axes."""

    number: str
    layout: str
    who: str
    sizes: dict[str, int]
    rows: str
    axis: int = 0
    ndim: int = 2


def listing(rows: str) -> list[tuple[str, int, int]]:
    """(part, head, dim) of every row.

    >>> listing("q:0-1.0 k:0.3")
    [('q', 0, 0), ('q', 1, 0), ('k', 0, 3)]
    """
    out = []
    for word in rows.split():
        part, _, numbers = word.partition(":")
        heads, dims = (_span(text) for text in numbers.split("."))
        for head in heads:
            for dim in dims:
                out.append((part, head, dim))
    return out


def _span(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


PACKINGS = (
    Packing("1", "(q|k|v) h d", "MPT, ViT qkv, torch in_proj_weight", {"h": 2, "d": 3}, "q:0-1.0-2 k:0-1.0-2 v:0-1.0-2"),
    Packing("2", "(q|k|v) h d", "GPT-2 c_attn, stored [in, out]", {"h": 3, "d": 2}, "q:0-2.0-1 k:0-2.0-1 v:0-2.0-1", axis=1),
    Packing("3", "h (q|k|v) d", "GPT-NeoX, BLOOM", {"h": 2, "d": 3}, "q:0.0-2 k:0.0-2 v:0.0-2 q:1.0-2 k:1.0-2 v:1.0-2"),
    Packing(
        "4",
        "h d (q|k|v)",
        "Megatron checkpoint version 1.0",
        {"h": 2, "d": 3},
        "q:0.0 k:0.0 v:0.0 q:0.1 k:0.1 v:0.1 q:0.2 k:0.2 v:0.2 q:1.0 k:1.0 v:1.0 q:1.1 k:1.1 v:1.1 q:1.2 k:1.2 v:1.2",
    ),
    Packing(
        "5",
        "m (q|v|k) n d",
        "CodeGen, four blocks",
        {"m": 4, "n": 2, "d": 3},
        """q:0-1.0-2 v:0-1.0-2 k:0-1.0-2  q:2-3.0-2 v:2-3.0-2 k:2-3.0-2
           q:4-5.0-2 v:4-5.0-2 k:4-5.0-2  q:6-7.0-2 v:6-7.0-2 k:6-7.0-2""",
    ),
    Packing("6", "(q h|k g|v g) d", "Phi-3, DBRX", {"h": 6, "g": 2, "d": 5}, "q:0-5.0-4 k:0-1.0-4 v:0-1.0-4"),
    Packing("6", "(q h|k|v) d", "StarCoder, Falcon-7B: one kv head", {"h": 6, "d": 5}, "q:0-5.0-4 k:0.0-4 v:0.0-4"),
    Packing(
        "7",
        "g (q r|k|v) d",
        "Falcon-40B, InternLM2, Megatron core",
        {"g": 2, "r": 3, "d": 5},
        "q:0-2.0-4 k:0.0-4 v:0.0-4 q:3-5.0-4 k:1.0-4 v:1.0-4",
    ),
    Packing(
        "8",
        "g (q r|gate r|k|v) d",
        "Megatron attention_output_gate",
        {"g": 2, "r": 3, "d": 5},
        "q:0-2.0-4 gate:0-2.0-4 k:0.0-4 v:0.0-4 q:3-5.0-4 gate:3-5.0-4 k:1.0-4 v:1.0-4",
    ),
    Packing(
        "9",
        "_ g (q r|k|v) d|gate h",
        "Megatron-Bridge QKVG: one gate row for each query head",
        {"g": 2, "r": 3, "d": 5},
        "q:0-2.0-4 k:0.0-4 v:0.0-4 q:3-5.0-4 k:1.0-4 v:1.0-4 gate:0-5.0",
    ),
    Packing(
        "10",
        "t (q n r|k n|v n) d",
        "MiMo-V2.5, GPT-NeoX with GQA: one block for each rank",
        {"t": 2, "n": 3, "r": 4, "d": 5},
        "q:0-11.0-4 k:0-2.0-4 v:0-2.0-4 q:12-23.0-4 k:3-5.0-4 v:3-5.0-4",
    ),
    Packing("11", "(gate|q|k|v) h d", "HRM-Text gqkv_proj", {"h": 2, "d": 3}, "gate:0-1.0-2 q:0-1.0-2 k:0-1.0-2 v:0-1.0-2"),
    Packing("12", "(q h|k g|v g|gate h) d", "Muse-Spark qkvg_proj", {"h": 6, "g": 2, "d": 5}, "q:0-5.0-4 k:0-1.0-4 v:0-1.0-4 gate:0-5.0-4"),
    Packing("13", "h (q|gate) d", "Qwen3-Next q_proj", {"h": 2, "d": 3}, "q:0.0-2 gate:0.0-2 q:1.0-2 gate:1.0-2"),
    Packing(
        "14",
        "h (q (nope dn|rope dr)|gate dv)",
        "A.X-K2 q_gate_proj, rows",
        {"h": 2, "dn": 3, "dr": 4, "dv": 5},
        "q.nope:0.0-2 q.rope:0.0-3 gate:0.0-4 q.nope:1.0-2 q.rope:1.0-3 gate:1.0-4",
    ),
    Packing("14", "resid x|compressed y", "A.X-K2 q_gate_proj, columns", {"x": 2, "y": 3}, "resid:0.0-1 compressed:0.0-2", axis=1),
    Packing(
        "15",
        "h (q dk|k dk|v dv)",
        "LeViT, TinyViT, EfficientFormer",
        {"h": 2, "dk": 3, "dv": 4},
        "q:0.0-2 k:0.0-2 v:0.0-3 q:1.0-2 k:1.0-2 v:1.0-3",
    ),
    Packing(
        "16", "q h dk|k h dk|v h dv", "PLaMo2, BoTNet, ONNX qkv_hidden_sizes", {"h": 2, "dk": 3, "dv": 4}, "q:0-1.0-2 k:0-1.0-2 v:0-1.0-3"
    ),
    Packing(
        "16",
        "q h dk|k h dk|v h dv|o h dv",
        "xLSTM, with its output gate",
        {"h": 2, "dk": 3, "dv": 4},
        "q:0-1.0-2 k:0-1.0-2 v:0-1.0-3 o:0-1.0-3",
    ),
    Packing("17", "q|k d|v d", "MobileViTv2: the query is one row", {"d": 3}, "q:0.0 k:0.0-2 v:0.0-2", ndim=4),
    Packing(
        "18", "q h dk|k dk|v dv", "LambdaNet: one k and one v", {"h": 2, "dk": 3, "dv": 4}, "q:0-1.0-2 k:0.0-2 v:0.0-3", axis=0, ndim=4
    ),
    Packing("19", "(k|v) g d", "Granite-Speech to_kv, JetMoE", {"g": 2, "d": 3}, "k:0-1.0-2 v:0-1.0-2"),
    Packing("20", "g (k|v) d", "Megatron linear_kv", {"g": 2, "d": 3}, "k:0.0-2 v:0.0-2 k:1.0-2 v:1.0-2"),
    Packing(
        "21",
        "h d (k|v)",
        "Megatron v1 cross-attention",
        {"h": 2, "d": 3},
        "k:0.0 v:0.0 k:0.1 v:0.1 k:0.2 v:0.2 k:1.0 v:1.0 k:1.1 v:1.1 k:1.2 v:1.2",
    ),
    Packing(
        "22",
        "h (k_nope dn|v dv)",
        "DeepSeek kv_b_proj",
        {"h": 2, "dn": 3, "dv": 4},
        "k_nope:0.0-2 v:0.0-3 k_nope:1.0-2 v:1.0-3",
    ),
    Packing("23", "latent l|k_rope dr", "DeepSeek kv_a_proj_with_mqa", {"l": 3, "dr": 2}, "latent:0.0-2 k_rope:0.0-1"),
    Packing("24", "h (nope dn|rope dr)", "DeepSeek q_b_proj", {"h": 2, "dn": 4, "dr": 3}, "nope:0.0-3 rope:0.0-2 nope:1.0-3 rope:1.0-2"),
    Packing(
        "25",
        "t (q_lora x|kv_lora y|rope z)",
        "Megatron linear_qkv_down_proj: one block for each rank",
        {"t": 2, "x": 3, "y": 4, "z": 5},
        "q_lora:0.0-2 kv_lora:0.0-3 rope:0.0-4 q_lora:1.0-2 kv_lora:1.0-3 rope:1.0-4",
    ),
    Packing("26", "(k=v) g d", "DeepSeek-V4 kv_proj: k is v", {"g": 2, "d": 3}, "k:0-1.0-2"),
    Packing("27", "(q=k) h d", "Reformer query_key: q is k", {"h": 2, "d": 3}, "q:0-1.0-2"),
    Packing(
        "28",
        "x h (k i|v j)",
        "ESMFold linear_kv_points: the coordinate is slowest",
        {"x": 3, "h": 2, "i": 4, "j": 5},
        """k:0.0-3 v:0.0-4 k:1.0-3 v:1.0-4
           k:0.4-7 v:0.5-9 k:1.4-7 v:1.5-9
           k:0.8-11 v:0.10-14 k:1.8-11 v:1.10-14""",
    ),
    Packing("29", "(q|k) d", "PP-DocLayout pointer, one head", {"d": 3}, "q:0.0-2 k:0.0-2"),
    Packing("29", "(q|k) h d", "ConViT, TNT", {"h": 2, "d": 3}, "q:0-1.0-2 k:0-1.0-2"),
    Packing("30", "(q h|k g) d", "Qwen4-exp index_qk_proj", {"h": 6, "g": 2, "d": 5}, "q:0-5.0-4 k:0-1.0-4"),
    Packing(
        "31",
        "mlp f|_ (q|k|v) h d",
        "timm ViT with parallel blocks",
        {"f": 5, "h": 2, "d": 3},
        "mlp:0.0-4 q:0-1.0-2 k:0-1.0-2 v:0-1.0-2",
    ),
    Packing("32", "_ (q|k|v) h d|mlp f", "Flux, HunyuanVideo linear1", {"h": 2, "d": 3, "f": 5}, "q:0-1.0-2 k:0-1.0-2 v:0-1.0-2 mlp:0.0-4"),
    Packing(
        "33",
        "_ (q|k|v) h d|gate f|up f",
        "Flux2 to_qkv_mlp_proj",
        {"h": 2, "d": 3, "f": 5},
        "q:0-1.0-2 k:0-1.0-2 v:0-1.0-2 gate:0.0-4 up:0.0-4",
    ),
    Packing(
        "34",
        "(q1|q2|k1|k2|v) h d",
        "Stable Audio 3, differential",
        {"h": 2, "d": 3},
        "q1:0-1.0-2 q2:0-1.0-2 k1:0-1.0-2 k2:0-1.0-2 v:0-1.0-2",
    ),
    Packing(
        "35",
        "q h s e|k h s e|v h d",
        "timm DiffAttention: s = 2 sub-heads of e = d/2",
        {"h": 3, "s": 2, "e": 4, "d": 8},
        "q:0-2.0-7 k:0-2.0-7 v:0-2.0-7",
    ),
    Packing(
        "36",
        "g (q dk|k dk|v r dv|z r dv)",
        "Qwen3-Next in_proj_qkvz",
        {"g": 2, "r": 3, "dk": 4, "dv": 5},
        "q:0.0-3 k:0.0-3 v:0-2.0-4 z:0-2.0-4 q:1.0-3 k:1.0-3 v:3-5.0-4 z:3-5.0-4",
    ),
    Packing("37", "g (b r|a r)", "Qwen3-Next in_proj_ba", {"g": 2, "r": 3}, "b:0-2.0 a:0-2.0 b:3-5.0 a:3-5.0"),
    Packing(
        "38", "q g dk|k g dk|v h dv", "Qwen3.5 in_proj_qkv", {"g": 2, "h": 6, "dk": 4, "dv": 5}, "q:0-1.0-3 k:0-1.0-3 v:0-5.0-4", ndim=3
    ),
    Packing(
        "39",
        "t (q n dk|k n dk|v n r dv|z n r dv|b n r|a n r)",
        "Megatron GatedDeltaNet in_proj: one block for each rank",
        {"t": 2, "n": 3, "r": 4, "dk": 5, "dv": 7},
        """q:0-2.0-4 k:0-2.0-4 v:0-11.0-6 z:0-11.0-6 b:0-11.0 a:0-11.0
           q:3-5.0-4 k:3-5.0-4 v:12-23.0-6 z:12-23.0-6 b:12-23.0 a:12-23.0""",
    ),
    Packing(
        "40",
        "z h dv|x h dv|B g n|C g n|dt h",
        "Mamba-2 family",
        {"h": 6, "g": 2, "dv": 4, "n": 5},
        "z:0-5.0-3 x:0-5.0-3 B:0-1.0-4 C:0-1.0-4 dt:0-5.0",
    ),
    Packing("41", "(x|z) f", "Mamba-1, Jamba in_proj", {"f": 3}, "x:0.0-2 z:0.0-2"),
    Packing("41", "dt l|B s|C s", "Mamba-1, Jamba x_proj", {"l": 2, "s": 3}, "dt:0.0-1 B:0.0-2 C:0.0-2"),
    Packing("42", "f (x|z)", "Zamba v1 in_proj", {"f": 3}, "x:0.0 z:0.0 x:0.1 z:0.1 x:0.2 z:0.2"),
    Packing("43", "(B|C|x) f", "LFM2 short convolution", {"f": 2}, "B:0.0-1 C:0.0-1 x:0.0-1"),
    Packing("43", "q f|ctx f|gates s", "FocalNet projection_in", {"f": 4, "s": 3}, "q:0.0-3 ctx:0.0-3 gates:0.0-2"),
    Packing(
        "44",
        "z h dv|x h dv|B y g n|C y g n|dt h|A h|trap h|angles e",
        "Mamba-3: B and C have their rank y outside the groups",
        {"h": 6, "g": 2, "dv": 5, "y": 4, "n": 7, "e": 8},
        """z:0-5.0-4 x:0-5.0-4
           B:0-1.0-6 B:0-1.7-13 B:0-1.14-20 B:0-1.21-27
           C:0-1.0-6 C:0-1.7-13 C:0-1.14-20 C:0-1.21-27
           dt:0-5.0 A:0-5.0 trap:0-5.0 angles:0.0-7""",
    ),
    Packing("45", "(Ca|Cb) d", "DeepSeek-V4 compressor kv_proj: two windows", {"d": 3}, "Ca:0.0-2 Cb:0.0-2"),
    Packing("46", "(cur|delayed) n d", "ZAYA: the first half of the v heads is current", {"n": 2, "d": 3}, "cur:0-1.0-2 delayed:0-1.0-2"),
    Packing("47", "r g d", "PLaMo q in GGUF: heads tiled", {"r": 3, "g": 2, "d": 5}, ":0.0-4 :3.0-4 :1.0-4 :4.0-4 :2.0-4 :5.0-4"),
    Packing(
        "47",
        "q g dk|k g dk|v r g dv",
        "Qwen3.5 in_proj_qkv in GGUF: v heads tiled",
        {"r": 3, "g": 2, "dk": 4, "dv": 5},
        "q:0-1.0-3 k:0-1.0-3 v:0.0-4 v:3.0-4 v:1.0-4 v:4.0-4 v:2.0-4 v:5.0-4",
    ),
    Packing("G1", "(gate|up) f", "Phi-3, GLM", {"f": 3}, "gate:0.0-2 up:0.0-2"),
    Packing("G2", "(up|gate) f", "gte, molmo2, Phi-4 audio, Hunyuan", {"f": 3}, "up:0.0-2 gate:0.0-2"),
    Packing("G3", "f (gate|up)", "gpt-oss", {"f": 3}, "gate:0.0 up:0.0 gate:0.1 up:0.1 gate:0.2 up:0.2", axis=2, ndim=3),
    Packing("G4", "x (gate|up) y", "TransformerEngine: blocks of y", {"x": 2, "y": 3}, "gate:0.0-2 up:0.0-2 gate:0.3-5 up:0.3-5"),
    Packing("G5", "(gate|up) f", "Mixtral in transformers 5, [E, 2i, H]", {"f": 4}, "gate:0.0-3 up:0.0-3", axis=1, ndim=3),
    Packing("G6", "(gate|up) f", "Llama 4, Aria, [E, H, 2i]", {"f": 4}, "gate:0.0-3 up:0.0-3", axis=2, ndim=3),
    Packing("G7", "e f", "DBRX, Nomic-MoE, ((E i) H): experts slowest", {"e": 2, "f": 3}, ":0.0-5"),
)
