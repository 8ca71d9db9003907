"""Random chains of conversions: after each, every row is the row of the original that its label says, and there is a way back to its bytes.

What a label means is written here once more, from the meaning of the language alone; verify must say of each result what this says.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import triptych as tt
from tests import files
from triptych.errors import SizeError, TriptychError
from triptych.stamp import KEY

EXAMPLES = max(70, settings().max_examples if settings().max_examples > 100 else 0)
"""Five thousand in a soak (tests/conftest.py)."""
Tensors = dict[str, NDArray[Any]]


class Turned(NamedTuple):
    """How the first (or last) `dims` of a head are paired: order "half" or "interleaved"; None: they are not turned."""

    order: str | None
    dims: int = 0
    last: bool = False


NOT_TURNED = Turned(None)


class Row(NamedTuple):
    """A row of the original: its part, head, and place in the head; several where parts are one tensor."""

    part: str
    head: int
    dim: int


# The language, slowly


def _sum(tokens: list[str]) -> list[list[Any]]:
    """The branches up to the closing bracket, each a list of words and of sums."""
    branches: list[list[Any]] = [[]]
    while tokens:
        token = tokens.pop(0)
        if token == ")":
            break
        if token == "|":
            branches.append([])
        else:
            branches[-1].append(_sum(tokens) if token == "(" else token)
    return branches


def _places(product: list[Any], sizes: Mapping[str, int]) -> Iterator[tuple[tuple[str, ...], list[tuple[str, int]]]]:
    """(words of the names, (axis, index) from the slowest in) of every row."""
    if not product:
        yield (), []
    elif isinstance(product[0], list):
        for branch in product[0]:
            for names, at in _places([*branch[1:], *product[1:]], sizes):
                yield (branch[0], *names), at
    else:
        for index in range(sizes["t" if product[0] == "m" else product[0]]):
            for names, at in _places(product[1:], sizes):
                yield names, [(product[0], index), *at]


def meant(text: str, sizes: Mapping[str, int], now: str | None, usual: Turned) -> list[Row | None]:
    """What each row is in the numbering of the original, whose pairs lie as `usual` says; `now`: how those lie that no axes name."""
    branches = _sum(re.findall(r"[()|]|[^\s()|]+", text))
    product = [branches] if len(branches) > 1 else branches[0]
    out: list[Row | None] = []
    for names, places in _places(product, sizes):
        words = [word for name in names for word in name.split(".") if word not in ("", "_")]
        part = next((word for word in words if word not in ("rot", "pass")), "")
        part, _, other = part.partition("=")
        at, axes = dict(places), [axis for axis, _ in places]
        beside = "h" in axes or "g" in axes
        heads = sorted((a for a in axes if a in "hgtmr" or (a == "n" and not beside)), key=lambda a: {"n": 1, "r": 2}.get(a, 0))
        head = 0
        for axis in heads:
            head = head * sizes["t" if axis == "m" else axis] + at[axis]
        dims, dim = [axis for axis in axes if axis not in heads and axis not in "cp"], 0
        for axis in dims:
            dim = dim * sizes[axis] + at[axis]
        start = sizes.get("dn", 0) if usual.last else 0
        if "c" in at:
            order = usual.order if part in "qk" else None
            dim = (start if "rot" in words else 0) + (2 * at["p"] + at["c"] if order == "interleaved" else at["c"] * sizes["p"] + at["p"])
        elif "pass" in words:
            dim += 0 if usual.last else usual.dims
        elif usual.order and now != usual.order and part in "qk":
            dim = _other(dim, now, usual, int(np.prod([sizes[axis] for axis in dims])))
        out.append(None if other == "0" else Row(part, head, dim))
    return out


def _other(dim: int, now: str | None, usual: Turned, whole: int) -> int:
    """Where a dim that lies in order `now` lay in the original."""
    start, pairs = (whole - usual.dims if usual.last else 0), usual.dims // 2
    inside = dim - start
    if not 0 <= inside < usual.dims:
        return dim
    c, p = (inside % 2, inside // 2) if now == "interleaved" else divmod(inside, pairs)
    return start + (2 * p + c if usual.order == "interleaved" else c * pairs + p)


# The models


@dataclass(frozen=True)
class Model:
    """A family: `rows` tells of each projection (name -> layout of its one or more tensors) along `axis`."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    rows: dict[str, str]
    sizes: dict[str, int]
    layouts: list[str]
    turned: Turned = NOT_TURNED
    axis: int = 0
    norms: dict[str, str] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        return any("k" in re.findall(r"[a-z]+", text) and "q" in re.findall(r"[a-z]+", text) for text in self.rows.values())


def _fused(home: str, name: str, layout: str, rows: int, wide: int, bias: bool = True) -> dict[str, Any]:
    tails = {"weight": (rows, wide), **({"bias": (rows,)} if bias else {})}
    names = {f"{home.format(layer)}.{name}.{tail}": shape for layer in (0, 1) for tail, shape in tails.items()}
    return {"shapes": names, "rows": dict.fromkeys(names, layout)}


def _apart(home: str, layouts: dict[str, str], rows: dict[str, int], wide: int, biases: str) -> dict[str, Any]:
    shapes, told = {}, {}
    for layer in (0, 1):
        for part, layout in layouts.items():
            for tail, shape in (("weight", (rows[part], wide)), ("bias", (rows[part],))):
                if tail == "weight" or part in biases:
                    name = f"{home.format(layer)}.{part}_proj.{tail}"
                    shapes[name], told[name] = shape, layout
    return {"shapes": shapes, "rows": told}


def _with(told: dict[str, Any], **more: tuple[int, ...]) -> dict[str, Any]:
    """More tensors of the first layer's home, whose names are written with _ in place of points."""
    home = next(iter(told["shapes"])).rpartition(".")[0].rpartition(".")[0]
    extra = {f"{home.replace('.0.', f'.{layer}.')}.{name.replace('__', '.')}": shape for layer in (0, 1) for name, shape in more.items()}
    return {**told, "shapes": {**told["shapes"], **extra}}


MHA = ["(q|k|v) h d", "h (q|k|v) d", "(q|k|v) d h", "h (v|q|k) d", "q h d|v h d|k h d", "t (q n|k n|v n) d"]
GQA = ["(q h|k g|v g) d", "g (q r|k|v) d", "(k g|q g r|v g) d", "(q r g|k g|v g) d", "t (q n r|k n|v n) d"]
PAIRED = ["q h p c|k h p c|v h d", "h (q p c|k p c|v d)"], ["q h p c|k g p c|v g d", "g (q r c p|k c p|v d)"]
Q_K_V = {"q": "(q h d)", "k": "(k g d)", "v": "(v g d)"}
ALIKE = {"q": "(q h d)", "k": "(k h d)", "v": "(v h d)"}
LLAMA = {"hidden_size": 20, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
TWO_THREE = {"h": 6, "g": 2, "d": 8}
NEOX = {"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
NORMS = {"q_norm__weight": (8,), "k_norm__weight": (8,)}
MODELS: dict[str, Model] = {
    "gpt_neox": Model({**NEOX, "rotary_pct": 0.5}, **_fused("gpt_neox.layers.{}.attention", "query_key_value", "h (q|k|v) d", 96, 32),
                      sizes={"h": 4, "d": 8}, layouts=MHA, turned=Turned("half", 4)),
    "gpt_neox, all": Model({**NEOX, "rotary_pct": 1.0}, **_fused("gpt_neox.layers.{}.attention", "query_key_value", "h (q|k|v) d", 96, 32),
                           sizes={"h": 4, "d": 8}, layouts=MHA + PAIRED[0], turned=Turned("half", 8)),
    "llama": Model({"model_type": "llama", **LLAMA}, **_apart("model.layers.{}.self_attn", Q_K_V, {"q": 48, "k": 16, "v": 16}, 20, ""),
                   sizes=TWO_THREE, layouts=GQA + PAIRED[1], turned=Turned("half", 8)),
    "qwen3": Model({"model_type": "qwen3", **LLAMA}, sizes=TWO_THREE, layouts=GQA + PAIRED[1], turned=Turned("half", 8),
                   **_with(_apart("model.layers.{}.self_attn", Q_K_V, {"q": 48, "k": 16, "v": 16}, 20, "qkv"), **NORMS),
                   norms={"q_norm": "(q d)", "k_norm": "(k d)"}),
    "phi3": Model({"model_type": "phi3", **LLAMA}, **_fused("model.layers.{}.self_attn", "qkv_proj", "(q h|k g|v g) d", 80, 20, False),
                  sizes=TWO_THREE, layouts=GQA + PAIRED[1], turned=Turned("half", 8)),
    "persimmon": Model({"model_type": "persimmon", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
                        "partial_rotary_factor": 0.5},
                       **_with(_fused("model.layers.{}.self_attn", "query_key_value", "h (q|k|v) d", 96, 32),
                               q_layernorm__weight=(8,), q_layernorm__bias=(8,), k_layernorm__weight=(8,), k_layernorm__bias=(8,)),
                       sizes={"h": 4, "d": 8}, layouts=MHA, turned=Turned("half", 4),
                       norms={"q_layernorm": "(q d)", "k_layernorm": "(k d)"}),
    "gptj": Model({"model_type": "gptj", "n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 8}, sizes={"h": 4, "d": 8},
                  **_apart("transformer.h.{}.attn", ALIKE, {"q": 32, "k": 32, "v": 32}, 32, ""), layouts=MHA + PAIRED[0],
                  turned=Turned("interleaved", 8)),
    "codegen": Model({"model_type": "codegen", "n_embd": 64, "n_head": 8, "n_layer": 2, "rotary_dim": 4},
                     **_fused("transformer.h.{}.attn", "qkv_proj", "m (q|v|k) n d", 192, 64, False),
                     sizes={"h": 8, "d": 8, "t": 4, "n": 2}, layouts=MHA[:5], turned=Turned("interleaved", 4)),
    "falcon": Model({"model_type": "falcon", "hidden_size": 48, "num_attention_heads": 6, "num_kv_heads": 2, "num_hidden_layers": 2,
                     "new_decoder_architecture": True},
                    **_fused("transformer.h.{}.self_attention", "query_key_value", "g (q r|k|v) d", 80, 48),
                    sizes=TWO_THREE, layouts=GQA + PAIRED[1], turned=Turned("half", 8)),
    "gpt2": Model({"model_type": "gpt2", "n_embd": 24, "n_head": 3, "n_layer": 2}, axis=1, sizes={"h": 3, "d": 8}, layouts=MHA[:5],
                  shapes={f"h.{layer}.{name}": shape for layer in (0, 1) for name, shape in (
                      ("attn.c_attn.weight", (24, 72)), ("attn.c_attn.bias", (72,)), ("attn.c_proj.weight", (24, 24)),
                      ("mlp.c_fc.weight", (24, 40)), ("mlp.c_proj.weight", (40, 24)))},
                  rows={f"h.{layer}.attn.c_attn.{tail}": "(q|k|v) h d" for layer in (0, 1) for tail in ("weight", "bias")}),
    "whisper": Model({"model_type": "whisper", "d_model": 24, "encoder_attention_heads": 3, "decoder_attention_heads": 3},
                     **_apart("model.encoder.layers.{}.self_attn", ALIKE, {"q": 24, "k": 24, "v": 24}, 24, "qv"),
                     sizes={"h": 3, "d": 8}, layouts=MHA[:5]),
}  # fmt: skip


def made(model: Model, folder: Path, shards: int) -> Tensors:
    """The checkpoint on disk, tensors in shards as they come; its arrays."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in model.shapes.items()}
    tensors["wte.weight"] = rng.standard_normal((7, 3)).astype(np.float32)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config))
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


# What a result holds


def loaded(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _home(name: str) -> tuple[str, str]:
    """The layer of a tensor, and whether it is a bias: parts of one name there belong together."""
    found = re.match(r".*?\.\d+\.", name)
    assert found is not None
    return found[0], "bias" if name.endswith("bias") else "weight"


def _order(words: str | None) -> str | None:
    return None if not words else "interleaved" if "interleaved" in words else "half"


class Held(NamedTuple):
    """A row of a result: its bytes, and the order in which its pairs lie."""

    data: bytes
    order: str | None


def _named(text: str) -> str | None:
    """The order of the pairs that a layout names."""
    axes = re.findall(r"[\w.]+", text)
    return None if "c" not in axes else "half" if axes[axes.index("c") + 1 : axes.index("c") + 2] == ["p"] else "interleaved"


def _rows(tensor: NDArray[Any], layout: str, sizes: Mapping[str, int], axis: int, now: str | None, usual: Turned) -> dict[Row, Held]:
    labels = meant(layout, sizes, now, usual)
    assert len(labels) == tensor.shape[axis], (layout, sizes, tensor.shape)
    rows = np.moveaxis(tensor, axis, 0)
    for label, row in zip(labels, rows, strict=True):
        assert label is not None or not row.any(), "rows declared zero"
    return {label: Held(row.tobytes(), _named(layout) or now) for label, row in zip(labels, rows, strict=True) if label is not None}


def original(model: Model, tensors: Tensors) -> dict[tuple[str, ...], dict[Row, Held]]:
    """Rows by layer, tail and what they are."""
    out: dict[tuple[str, ...], dict[Row, Held]] = {}
    for name, layout in model.rows.items():
        axis = model.axis if tensors[name].ndim > 1 else 0
        out.setdefault(_home(name), {}).update(_rows(tensors[name], layout, _all(model.sizes), axis, model.turned.order, model.turned))
    for name, tensor in tensors.items():
        for norm, layout in model.norms.items():
            if f".{norm}." in name:
                out[*_home(name), norm] = _rows(tensor, layout, _all(model.sizes), 0, model.turned.order, model.turned)
    return out


def _all(sizes: Mapping[str, int]) -> dict[str, int]:
    known = {"g": sizes["h"], **sizes}
    return {**known, "r": known["h"] // known["g"]}


def held(model: Model, folder: Path) -> dict[tuple[str, ...], dict[Row, Held]]:
    """The same of a result, by what its stamp says."""
    tensors, found = loaded(folder), tt.inspect(folder)
    out: dict[tuple[str, ...], dict[Row, Held]] = {}
    for packed in found.projections:
        for piece in packed.pieces if packed.kind in ("attention", "norm") else ():
            key = _home(piece.tensor) if packed.kind == "attention" else (*_home(piece.tensor), piece.tensor.split(".")[-2])
            axis = packed.axis if tensors[piece.tensor].ndim > 1 else 0
            now = _order(packed.rope) or model.turned.order
            out.setdefault(key, {}).update(
                _rows(tensors[piece.tensor], str(piece.layout), packed.sizes, axis, now, model.turned))  # fmt: skip
    for name, tensor in tensors.items():  # norms that nobody moved
        for norm, layout in model.norms.items():
            if f".{norm}." in name and (*_home(name), norm) not in out:
                out[*_home(name), norm] = _rows(tensor, layout, _all(model.sizes), 0, model.turned.order, model.turned)
    return out


def check(model: Model, tensors: Tensors, folder: Path) -> None:
    """Every row is where its stamp says, and pairs of q, k and their norms lie alike."""
    mine, theirs = original(model, tensors), held(model, folder)
    assert mine.keys() == theirs.keys()
    for key, rows in mine.items():
        assert {label: row.data for label, row in rows.items()} == {label: row.data for label, row in theirs[key].items()}, key
    if model.turned.order:
        for layer in {key[0] for key in mine}:
            orders = {row.order for key, rows in theirs.items() if key[0] == layer
                      for label, row in rows.items() if label.part in ("q", "k")
                      and (label.dim >= 0 and label.dim < model.turned.dims)}  # fmt: skip
            assert len(orders) == 1, (layer, orders)


# Chains


class Op(NamedTuple):
    """A conversion in the words of `tt.convert`."""

    to: str | None
    words: dict[str, Any]
    sizes: dict[str, int]


def ops(model: Model, rng: random.Random) -> Op:
    layout = rng.choice(model.layouts)
    to = rng.choice(["split", "fused", f"fused:{layout}", f"fused:{layout}", layout, "keep"])
    words: dict[str, Any] = {"workers": rng.choice([1, 1, 2])}
    if model.turned.order and (to == "keep" or rng.random() < 0.3):
        words["rope"] = rng.choice(["half", "interleaved"])
    if model.axis and (to == "keep" or rng.random() < 0.3):
        words["orientation"] = rng.choice(["linear", "conv1d"])
    if rng.random() < 0.25:
        words["max_shard_size"] = rng.choice([5000, 20000])
    if rng.random() < 0.25:
        words["overrides"] = {rng.choice(["*.0.*", "*.1.*"]): rng.choice(["keep", "split", "fused", f"fused:{layout}"])}
    sizes = {"h": model.sizes["h"]}  # blocks of heads do not tell it
    return Op(to, words, {**sizes, **(_blocks(layout, model.sizes, 2) if layout in f"{to} {words}" else {})})


def _blocks(layout: str, sizes: Mapping[str, int], t: int) -> dict[str, int]:
    """What a layout in blocks needs beyond the heads."""
    return {"t": t, "n": _all(sizes)["g"] // t} if re.search(r"\b[tm]\b", layout) else {}


def home_again(model: Model, now: Path, place: Path) -> Path:
    """The last result turned back, each step where there is something to do."""
    fused = next(iter(model.rows.values())) if model.fused else "split"
    steps: list[dict[str, Any]] = [{"rope": model.turned.order}] if model.turned.order else []
    steps += [{"orientation": "conv1d"}] if model.axis else []
    steps += [{"to": "fused"}, {"to": fused}] if model.fused else [{"to": "split"}]
    for number, words in enumerate(steps):
        out = place / f"back{number}"
        sizes = {"h": model.sizes["h"], **_blocks(fused, model.sizes, 4)} if "to" in words else {}
        try:
            tt.convert(now, out, **words, **sizes)
        except TriptychError as error:
            assert error.what == "there is nothing to convert", error
        else:
            now = out
    return now


@settings(derandomize=True, deadline=None, max_examples=EXAMPLES, database=None, phases=[Phase.generate])
@given(name=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 1 << 30))
def test_every_row_after_every_conversion_and_the_way_back(name: str, seed: int) -> None:
    model, rng = MODELS[name], random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        first = now = Path(folder) / "a"
        tensors = made(model, first, rng.choice([1, 1, 3]))
        for number in range(rng.choice([1, 2, 3, 4])):
            op, out = ops(model, rng), Path(folder) / f"b{number}"
            try:
                tt.convert(now, out, op.to, **op.words, **op.sizes)
            except TriptychError as error:
                assert not out.exists() and error.what in REFUSED, (op, str(error))
                continue
            check(model, tensors, out)
            tt.verify(now, out)
            tt.verify(first, out)
            now = out
        assert files.read(home_again(model, now, Path(folder))) == files.read(first)


REFUSED = {
    "there is nothing to convert",
    "the two layouts do not label the same rows",  # all dims of a head in pairs, of which some are turned
}


# What such chains did wrong, one by one


def small(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Tensors:
    model = Model(config, shapes, {}, {}, [])
    return {name: tensor for name, tensor in made(model, folder, 1).items() if name in shapes}


def told(plan: tt.Plan) -> list[str]:
    return [note for note in plan.notes if "config.json still says" in note]


def test_joined_as_the_family_has_them_after_their_pairs_were_turned(tmp_path: Path) -> None:
    """The order of the family's fused tensor, and a note where its code would read other pairs than lie there."""
    model = MODELS["gpt_neox"]
    made(model, tmp_path / "a", 1)
    tt.convert(tmp_path / "a", tmp_path / "b", "split", rope="interleaved")
    assert told(tt.plan(tmp_path / "b", "fused")) and not told(tt.plan(tmp_path / "b", "fused", rope="half"))
    assert "are stamped rotary partial interleaved" in str(tt.inspect(tmp_path / "b"))
    tt.convert(tmp_path / "b", tmp_path / "c", "fused")
    tt.convert(tmp_path / "c", tmp_path / "d", rope="half")
    assert files.read(tmp_path / "d") == files.read(tmp_path / "a")


def test_parts_that_were_left_apart_are_read_by_the_code_again(tmp_path: Path) -> None:
    made(MODELS["llama"], tmp_path / "a", 1)
    tt.convert(tmp_path / "a", tmp_path / "b", "fused")
    assert not told(tt.plan(tmp_path / "b", "split")) and told(tt.plan(tmp_path / "b", "split", rope="interleaved"))


@pytest.mark.parametrize("to", ["fused:q h p c|k h p c|v h d", "fused:h (q p c|k p c|v d)"])
def test_pairs_that_lie_interleaved_already(tmp_path: Path, to: str) -> None:
    """GPT-J's d is told by its record: a layout that names the pairs as they lie moves no row within a head."""
    tensors = made(MODELS["gptj"], tmp_path / "a", 1)
    tt.convert(tmp_path / "a", tmp_path / "b", to)
    heads = {part: tensors[f"transformer.h.0.attn.{part}_proj.weight"].reshape(4, 8, 32) for part in "qkv"}
    parts = np.stack([heads[part] for part in "qkv"], axis=1 if "h (" in to else 0)
    assert np.array_equal(loaded(tmp_path / "b")["transformer.h.0.attn.qkv_proj.weight"], parts.reshape(96, 32))
    tt.verify(tmp_path / "a", tmp_path / "b")
    tt.verify(tmp_path / "a", tmp_path / "b", to)


def test_a_bias_that_one_part_lacks(tmp_path: Path) -> None:
    """Joined, split and joined again, it has rows of zeros again."""
    made(MODELS["whisper"], tmp_path / "a", 1)
    for number, to in enumerate(("fused", "split", "fused")):
        tt.convert(tmp_path / f"x{number}" if number else tmp_path / "a", tmp_path / f"x{number + 1}", to)
    bias = loaded(tmp_path / "x3")["model.encoder.layers.0.self_attn.qkv_proj.bias"]
    assert bias.shape == (72,) and not bias[24:48].any() and bias[:24].all() and bias[48:].all()


def test_sizes_that_contradict_the_stamp(tmp_path: Path) -> None:
    made(MODELS["gpt_neox"], tmp_path / "a", 1)
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d")
    with pytest.raises(SizeError, match="the given size of 'h' contradicts"):
        tt.plan(tmp_path / "b", "h (q|k|v) d", h=8, d=4)


def test_norms_follow_pairs_that_a_layout_names(tmp_path: Path) -> None:
    """Without --rope: by the layout of the target, and by one given by hand; stamped norms too."""
    model = MODELS["qwen3"]
    tensors = made(model, tmp_path / "a", 1)
    norm, exchanged = "model.layers.1.self_attn.k_norm.weight", np.arange(8).reshape(2, 4).T.reshape(-1)
    tt.convert(tmp_path / "a", tmp_path / "b", "fused:q h p c|k g p c|v g d")
    assert np.array_equal(loaded(tmp_path / "b")[norm], tensors[norm][exchanged])
    tt.verify(tmp_path / "a", tmp_path / "b")
    tt.convert(tmp_path / "b", tmp_path / "c", "g (q r c p|k c p|v d)")
    assert np.array_equal(loaded(tmp_path / "c")[norm], tensors[norm])
    tt.verify(tmp_path / "a", tmp_path / "c")
    by_hand = {"*q_proj.*": "(q h p c)", "*k_proj.*": "(k g p c)"}
    tt.convert(tmp_path / "a", tmp_path / "d", rope="half", layouts=by_hand)
    assert np.array_equal(loaded(tmp_path / "d")[norm][exchanged], tensors[norm])
    tt.verify(tmp_path / "a", tmp_path / "d", layouts=by_hand)


def test_a_norm_is_no_part_to_split(tmp_path: Path) -> None:
    made(MODELS["qwen3"], tmp_path / "a", 1)
    tt.convert(tmp_path / "a", tmp_path / "b", "fused", rope="interleaved")
    tt.convert(tmp_path / "b", tmp_path / "c", overrides={"*.1.*": "split"})
    assert "model.layers.1.self_attn.q_norm.weight" in loaded(tmp_path / "c")


def test_a_norm_for_each_head(tmp_path: Path) -> None:
    """StableLM's are turned with the dims that they scale."""
    home = "model.layers.0.self_attn"
    shapes = {f"{home}.{part}_proj.weight": (32, 32) for part in "qkv"}
    shapes |= {f"{home}.{part}_layernorm.norms.{head}.weight": (8,) for part in "qk" for head in range(4)}
    config = {"model_type": "stablelm", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "qk_layernorm": True}
    tensors = small(tmp_path / "a", {**config, "partial_rotary_factor": 0.5}, shapes)
    tt.convert(tmp_path / "a", tmp_path / "b", rope="interleaved")
    found = loaded(tmp_path / "b")
    for name in shapes:
        assert "norms" not in name or np.array_equal(found[name], tensors[name][[0, 2, 1, 3, 4, 5, 6, 7]]), name
    tt.verify(tmp_path / "a", tmp_path / "b", rope="interleaved")


GATED = {"hidden_size": 20, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text"])
def test_k_is_turned_where_the_gate_lies_with_q(tmp_path: Path, kind: str) -> None:
    home = "model.layers.3.self_attn"
    shapes = {f"{home}.q_proj.weight": (96, 20), f"{home}.k_proj.weight": (16, 20), f"{home}.v_proj.weight": (16, 20)}
    shapes |= {f"{home}.q_norm.weight": (8,), f"{home}.k_norm.weight": (8,)}
    tensors = small(tmp_path / "a", {"model_type": kind, **GATED}, shapes)
    tt.convert(tmp_path / "a", tmp_path / "b", rope="interleaved")
    found, order = loaded(tmp_path / "b"), [0, 2, 1, 3, 4, 5, 6, 7]
    q, k = (tensors[f"{home}.{part}_proj.weight"] for part in "qk")
    both = q.reshape(6, 2, 8, 20).copy()
    both[:, 0] = both[:, 0, order]
    assert np.array_equal(found[f"{home}.q_proj.weight"], both.reshape(96, 20))
    assert np.array_equal(found[f"{home}.k_proj.weight"], k.reshape(2, 8, 20)[:, order].reshape(16, 20))
    assert np.array_equal(found[f"{home}.v_proj.weight"], tensors[f"{home}.v_proj.weight"])
    assert all(np.array_equal(found[f"{home}.{part}_norm.weight"], tensors[f"{home}.{part}_norm.weight"][order]) for part in "qk")


def test_q_is_not_turned_beside_a_k_that_nobody_knows(tmp_path: Path) -> None:
    shapes = {"layers.0.attn.q_proj.weight": (48, 20), "layers.0.attn.k_proj.weight": (16, 20)}
    small(tmp_path / "a", {}, shapes)
    with pytest.raises(tt.PlanError, match="q and k would be turned apart"):
        tt.plan(tmp_path / "a", rope="half", layouts={"*q_proj*": "(q h p c)"}, h=6, d=8)
    tt.plan(tmp_path / "a", rope="half", layouts={"*q_proj*": "(q h p c)", "*k_proj*": "(k g p c)"}, h=6, g=2, d=8)


def test_weights_that_were_turned_and_turned_back(tmp_path: Path) -> None:
    """Those beside the projections too are known in the input when the output is proved."""
    made(MODELS["gpt2"], tmp_path / "a", 1)
    tt.convert(tmp_path / "a", tmp_path / "b", orientation="linear")
    tt.convert(tmp_path / "b", tmp_path / "c", orientation="conv1d")
    tt.verify(tmp_path / "a", tmp_path / "c")
    with safe_open(tmp_path / "c" / "model.safetensors", "np") as file:
        stamp = json.loads(file.metadata()[KEY])["layouts"]
    assert {entry["axis"] for name, entry in stamp.items() if name.endswith("weight")} == {1}
