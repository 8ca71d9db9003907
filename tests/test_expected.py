"""What an output must be, stated by the person: every way to convert, with its stamp and without; and what the converter knows of rotary
order and of tensors beside a projection is not believed."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import triptych as tt
from tests import files
from triptych import axes
from triptych.cli import main
from triptych.errors import MismatchError, PlanError, TriptychError
from triptych.layout import Layout
from triptych.listing import listing, turn_of
from triptych.rope import named, rope_of, sizes_of
from triptych.sizes import bind

H, G, D, IN = 6, 2, 8, 20
SELF = "model.layers.{}.self_attn."
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def qwen3() -> tuple[dict[str, Any], Shapes]:
    """Separate q, k, v with norms over a head; two layers."""
    config = {"model_type": "qwen3", "hidden_size": IN, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": D}
    made: Shapes = {}
    for home in map(SELF.format, range(2)):
        made |= {f"{home}{part}_proj.weight": ("BF16", (heads * D, IN)) for part, heads in (("q", H), ("k", G), ("v", G))}
        made |= {f"{home}{part}_norm.weight": ("BF16", (D,)) for part in "qk"} | {f"{home}o_proj.weight": ("BF16", (IN, H * D))}
    return config, made


def olmo2() -> tuple[dict[str, Any], Shapes]:
    """Norms over all heads."""
    config = {"model_type": "olmo2", "hidden_size": H * D, "num_attention_heads": H, "num_key_value_heads": G, "num_hidden_layers": 1}
    home = SELF.format(0)
    made: Shapes = {f"{home}{part}_proj.weight": ("F32", (heads * D, H * D)) for part, heads in (("q", H), ("k", G), ("v", G))}
    return config, made | {f"{home}q_norm.weight": ("F32", (H * D,)), f"{home}k_norm.weight": ("F32", (G * D,))}


def gpt2() -> tuple[dict[str, Any], Shapes]:
    """Weights [in, out], one of them square."""
    made: Shapes = {"h.0.attn.c_attn.weight": ("F32", (24, 72)), "h.0.attn.c_attn.bias": ("F32", (72,))}
    more: Shapes = {"h.0.attn.c_proj.weight": ("F32", (24, 24)), "h.0.mlp.c_fc.weight": ("F16", (24, 40))}
    return {"model_type": "gpt2", "n_embd": 24, "n_head": 3}, made | more


def neox() -> tuple[dict[str, Any], Shapes]:
    """Half of a head is turned."""
    qkv = "gpt_neox.layers.0.attention.query_key_value."
    config = {"model_type": "gpt_neox", "hidden_size": 24, "num_attention_heads": 3, "rotary_pct": 0.5}
    return config, {f"{qkv}weight": ("BF16", (72, 24)), f"{qkv}bias": ("BF16", (72,))}


def gptj() -> tuple[dict[str, Any], Shapes]:
    """Separate, half of a head is turned, interleaved."""
    config = {"model_type": "gptj", "n_embd": 24, "n_head": 3, "rotary_dim": 4}
    return config, {f"transformer.h.0.attn.{part}_proj.weight": ("F32", (24, 24)) for part in "qkv"}


def deepseek() -> tuple[dict[str, Any], Shapes]:
    config = {"model_type": "deepseek_v3", "hidden_size": 32, "num_attention_heads": 3, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
              "v_head_dim": 5, "kv_lora_rank": 12, "q_lora_rank": 10, "num_key_value_heads": 3}  # fmt: skip
    home = SELF.format(0)
    return config, {f"{home}q_b_proj.weight": ("F32", (30, 10)), f"{home}kv_b_proj.weight": ("F32", (33, 12)),
                    f"{home}kv_a_proj_with_mqa.weight": ("F32", (16, 32))}  # fmt: skip


GROUPED = "fused:g (q r|k|v) d"
CASES: list[tuple[Any, dict[str, Any]]] = [
    *((make, {"rope": rope}) for make, rope in ((qwen3, "interleaved"), (olmo2, "interleaved"), (gptj, "half"), (neox, "interleaved"),
                                                (deepseek, "half"))),
    (qwen3, {"to": GROUPED, "rope": "interleaved"}), (qwen3, {"to": "fused:g (q r|k|v) p c", "rope": "half"}),
    (qwen3, {"to": "fused:g (q r|k|v) p c"}), (qwen3, {"to": "fused", "overrides": {"*.1.*": "keep"}, "rope": "interleaved"}),
    (olmo2, {"to": "fused:(v g|k g|q h) d", "names": {"*qkv_proj.weight": "*wqkv.weight"}}),
    (gptj, {"to": "fused:h (q|k|v) d", "rope": "half"}), (neox, {"to": "split", "rope": "interleaved"}), (neox, {"to": "(q|k|v) h d"}),
    (gpt2, {"to": "h (q|k|v) d", "orientation": "linear"}), (gpt2, {"to": "split", "orientation": "linear"}), (gpt2, {"to": "split"}),
]  # fmt: skip


def unstamp(folder: Path) -> None:
    """The output as another program would leave it: no word of how its rows lie."""
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header["__metadata__"].pop("triptych")
        files.raw(path, header, content[start:])


@pytest.mark.parametrize(("make", "asked"), CASES, ids=lambda value: value.__name__ if callable(value) else str(value))
def test_what_was_asked_for_is_proved(make: Any, asked: dict[str, Any], tmp_path: Path) -> None:
    config, made = make()
    files.checkpoint(tmp_path / "a", [made], config)
    tt.convert(tmp_path / "a", tmp_path / "b", **asked)
    told = tt.verify(tmp_path / "a", tmp_path / "b")
    stated = tt.verify(tmp_path / "a", tmp_path / "b", **asked)
    assert stated.rows >= told.rows > 0
    unstamp(tmp_path / "b")
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "b")  # the output's own may tell the order
    assert replace(tt.verify(tmp_path / "a", tmp_path / "b", **asked), notes=stated.notes) == stated
    with pytest.raises(TriptychError):
        tt.verify(tmp_path / "a", tmp_path / "b")
    tt.certify(tmp_path / "a", tmp_path / "b", **asked).write(tmp_path / "c.json")
    tt.check_certificate(tmp_path / "c.json", tmp_path / "b", tmp_path / "a")
    moved = next(name for name, data in files.read(tmp_path / "b").items() if files.read(tmp_path / "a").get(name) != data)
    path = tmp_path / "b" / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + json.loads(content[8:start])[moved]["data_offsets"][1] - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MismatchError, match=r"is not the row of the input|should be unchanged"):
        tt.verify(tmp_path / "a", tmp_path / "b", **asked)


def test_a_stamp_that_contradicts_is_shown_with_what_was_asked(tmp_path: Path) -> None:
    config, made = qwen3()
    files.checkpoint(tmp_path / "a", [made], config)
    tt.convert(tmp_path / "a", tmp_path / "b", GROUPED, rope="interleaved")
    with pytest.raises(MismatchError, match="the output has another layout") as caught:
        tt.verify(tmp_path / "a", tmp_path / "b", "fused:(q h|k g|v g) d", rope="interleaved")
    assert "(q h|k g|v g) d with" in str(caught.value.fields["expected"]) and "(stamp)" in str(caught.value.fields["found"])
    with pytest.raises(MismatchError, match="another"):
        tt.verify(tmp_path / "a", tmp_path / "b", GROUPED)
    for wrong, match in (({"to": "split"}, "speaks of no projection"), ({"overrides": {"*.7.*": "keep"}}, "no projection has a name"),
                         ({"names": {"a": "b"}}, "without a target"), ({"rope": "quarter"}, "no such rotary order"),
                         ({"to": GROUPED, "names": {"x": "y"}}, "no output tensor has this name"),
                         ({"to": GROUPED, "names": {"*": "y"}}, "as many stars")):  # fmt: skip
        with pytest.raises(PlanError, match=match):
            tt.verify(tmp_path / "a", tmp_path / "b", **wrong)


def test_gguf_after_rope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No stamp, and a record that says the order before: what was asked for says the rest."""
    out = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    out.add_head_count(H), out.add_head_count_kv(G), out.add_embedding_length(96), out.add_block_count(2)
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1
    for i in range(2):
        for part, heads in (("q", H), ("k", G), ("v", G)):
            weight = rng.normal(size=(heads * 16, 96)).astype(np.float32)
            out.add_tensor(f"blk.{i}.attn_{part}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for write in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        write()
    tt.convert(tmp_path / "a.gguf", tmp_path / "b.gguf", rope="half")
    assert tt.verify(tmp_path / "a.gguf", tmp_path / "b.gguf", rope="half").rows == 2 * (H + 2 * G) * 16
    with pytest.raises(MismatchError, match="is not the row") as caught:
        tt.verify(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert "--rope half" in str(caught.value.fields["try"])
    with pytest.raises(SystemExit) as left:
        main(["verify", str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf"), "--rope", "half"])
    assert not left.value.code and "rows of 2 projections compared by label" in capsys.readouterr().out
    with pytest.raises(MismatchError, match="is not the row"):
        tt.verify(tmp_path / "a.gguf", tmp_path / "b.gguf", rope="interleaved")


def test_pairs_are_told_as_the_language_tells_them() -> None:
    """Two statements of one rule: dims told by their pairs here, layouts with the pairs named in rope.py."""
    sizes = {"h": 6, "g": 2, "d": 8, "dn": 3, "dr": 4}
    texts = ("h (q|k|v) d", "(q h|k g|v g) d", "g (q r|k|v) d", "h (nope dn|rope dr)", "(q h c p|k g c p|v g d)", "g (q r p c|k c p|v p c)",
             "q p h c|v h d", "(v h d)")  # fmt: skip
    count = 0
    for text in texts:
        for words in ("half", "interleaved", "partial half: first 4 of 8 dims", "partial interleaved: last 6 of 8 dims"):
            for order in (None, "half", "interleaved") if "nope" not in text or "partial" not in words else ():
                layout, rope, turn = Layout(text), rope_of(words), turn_of(words)
                assert rope is not None and turn is not None
                one, two = (
                    bind(layout, **{axis: size for axis, size in sizes.items() if axis in layout.axes or axis in "hgd"}),
                    named(layout, rope, order),
                )
                more = {**one, "dv": 8, **sizes_of(layout, rope, one)}
                bound = bind(two, **{axis: size for axis, size in more.items() if axis in two.axes or axis in axes.ATOMS})
                turn = turn if order is None else turn._replace(order=order, asked=True)
                assert [entry.labels for entry in listing(layout, one, turn)] == [entry.labels for entry in listing(two, bound)], (
                    text,
                    words,
                )
                count += 1
    assert count == 90


# A converter that errs in what it knows of rotary order, or of tensors beside a projection


def _wrong_order(right: Any) -> Any:
    return lambda layout, rope, order=None: right(layout, rope, order and "half")


def _wrong_source(right: Any) -> Any:
    return lambda layout, rope, order=None: right(layout, rope._replace(order="interleaved"), order)


def _last_for_first(right: Any) -> Any:
    return lambda layout, rope, order=None: right(layout, rope._replace(last=True), order)


def _all_for_some(right: Any) -> Any:
    return lambda words: right(words) and right(words)._replace(first=None)


def _none(right: Any) -> Any:
    return lambda *given: iter(())


def _but_the_last(right: Any) -> Any:
    return lambda *given: iter(list(right(*given))[:-1])


def _of_the_other_part(right: Any) -> Any:
    """The rows of every norm as v has them: not turned at all."""

    def norms(*given: Any) -> Any:
        for packed in right(*given):
            yield replace(
                packed, rope=None, layout=Layout("f"), sizes=bind("f", f=D), pieces=(replace(packed.pieces[0], layout=Layout("f")),)
            )

    return norms


BUGS: list[tuple[str, Any, Any, dict[str, Any]]] = [
    ("named", _wrong_order, qwen3, {"to": GROUPED, "rope": "interleaved"}),
    ("named", _wrong_source, qwen3, {"to": GROUPED, "rope": "interleaved"}),
    ("named", _last_for_first, neox, {"rope": "interleaved"}),
    ("rope_of", _all_for_some, neox, {"rope": "interleaved"}),
    ("norms", _none, qwen3, {"rope": "interleaved"}),
    ("norms", _but_the_last, qwen3, {"to": GROUPED, "rope": "interleaved"}),
    ("norms", _of_the_other_part, qwen3, {"rope": "interleaved"}),
    ("neighbours", _none, gpt2, {"orientation": "linear"}),
    ("neighbours", _but_the_last, gpt2, {"to": "split", "orientation": "linear"}),
]


@pytest.mark.parametrize(("what", "bug", "make", "asked"), BUGS, ids=[f"{what}{bug.__name__}" for what, bug, _, _ in BUGS])
def test_errors_of_rotary_order_and_neighbours_are_found(
    what: str, bug: Any, make: Any, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the output's own stamp, which says what the converter believed, and by what was asked for."""
    config, made = make()
    files.checkpoint(tmp_path / "a", [made], config)
    tt.convert(tmp_path / "a", tmp_path / "right", **asked)
    moves = sys.modules["triptych.moves"]
    for module in (moves, sys.modules["triptych.beside" if what in ("norms", "neighbours") else "triptych.rope"]):
        monkeypatch.setattr(module, what, bug(getattr(moves, what)))
    tt.convert(tmp_path / "a", tmp_path / "b", **{"overrides": {}, **asked})
    assert files.read(tmp_path / "b") != files.read(tmp_path / "right"), "the bug changes nothing"
    for stated in ({}, asked):
        with pytest.raises(MismatchError):
            tt.verify(tmp_path / "a", tmp_path / "b", **stated)
    tt.verify(tmp_path / "a", tmp_path / "right", **asked)
