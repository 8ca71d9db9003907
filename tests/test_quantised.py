"""Packed numbers in a conversion: fused GPTQ, AWQ and compressed-tensors weights taken apart word by word, or refused with the boundary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import triptych as tt
from tests import sharding_oracle as oracle
from tests.test_shard_quantised import CONFIG, HID, A, Arrays, D, F, G, H, M, quantised, read, told_of, write
from triptych.errors import PlanError

QKV = f"{A}qkv_proj"
PHI = {**CONFIG, "model_type": "phi3", "intermediate_size": F}
ROWS = [H * D, (H + G) * D]


def fused(path: Path, kind: str, bits: int, sort: bool = False) -> Arrays:
    """A fused q|k|v weight with its bias; its numbers as plain matrices."""
    stored, plain = quantised(kind, bits, (H + 2 * G) * D, HID, 1, sort=sort)
    bias = {f"{QKV}.bias": np.arange((H + 2 * G) * D).astype(np.float16)}
    write(path, {**{f"{QKV}.{word}": x for word, x in stored.items()}, **bias}, told_of(kind, bits), PHI)
    return plain


def parts_of(path: Path, kind: str, bits: int) -> list[Arrays]:
    tensors = load_file(path / "model.safetensors")
    found = []
    for part in "qkv":
        own = {name.rpartition(".")[2]: x for name, x in tensors.items() if name.startswith(f"{A}{part}_proj.")}
        found.append({**read(own, kind, bits), "bias": own["bias"]})
    return found


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize(("kind", "bits"), [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_split(tmp_path: Path, kind: str, bits: int, sort: bool) -> None:
    """Every number where slicing the unpacked matrices puts it; every part gets the group numbers of its inputs, sorted or not."""
    plain = fused(tmp_path / "a", kind, bits, sort)
    tt.convert(tmp_path / "a", tmp_path / "s", "split")
    found = parts_of(tmp_path / "s", kind, bits)
    for key in ("weight", "zeros", "scales"):
        for own, expected in zip(found, np.split(plain[key].T, ROWS), strict=True):
            assert np.array_equal(own[key].T, expected), key
    assert all(np.array_equal(own["index"], plain["index"]) for own in found if kind == "gptq")
    assert np.array_equal(np.concatenate([own["bias"] for own in found]), np.arange((H + 2 * G) * D))
    assert tt.verify(tmp_path / "a", tmp_path / "s")


def test_split_weights_are_divided_by_their_stamps(tmp_path: Path) -> None:
    plain = fused(tmp_path / "a", "gptq", 4)
    tt.convert(tmp_path / "a", tmp_path / "s", "split")
    tt.shard(tmp_path / "s", tmp_path / "r", 4)
    q, k, v = np.split(plain["weight"].T, ROWS)
    for rank in range(4):
        found = parts_of(tmp_path / "r" / f"rank-{rank}-of-4", "gptq", 4)
        for own, expected in zip(found, oracle.vllm_qkv(q, k, v, H, G, 4, rank), strict=True):
            assert np.array_equal(own["weight"].T, expected) and np.array_equal(own["index"], plain["index"])


def test_stamped_words_are_not_held_against_every_stamped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10,000 of each that took minutes."""
    fused(tmp_path / "a", "gptq", 4)
    tt.convert(tmp_path / "a", tmp_path / "s", "split")
    monkeypatch.setattr("triptych.quantised.fnmatchcase", lambda name, glob: pytest.fail(f"{name} is held against {glob}"))
    assert {one.source for one in tt.inspect(tmp_path / "s").projections} == {"stamp"}


def test_fused_again(tmp_path: Path) -> None:
    """AWQ has no group numbers: what was taken apart is joined to the same bytes."""
    fused(tmp_path / "a", "awq", 4)
    tt.convert(tmp_path / "a", tmp_path / "s", "split")
    tt.convert(tmp_path / "s", tmp_path / "f", "fused")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in "af")
    assert before.keys() == after.keys() and all(np.array_equal(after[name], x) for name, x in before.items())
    fused(tmp_path / "g", "gptq", 4)
    tt.convert(tmp_path / "g", tmp_path / "h", "split")
    with pytest.raises(PlanError, match="group numbers of inputs are no rows to join"):
        tt.plan(tmp_path / "h", "fused")


def test_gate_and_up(tmp_path: Path) -> None:
    name = f"{M}gate_up_proj"
    stored, plain = quantised("gptq", 4, 2 * F, HID, 2)
    write(tmp_path / "a", {f"{name}.{word}": x for word, x in stored.items()}, told_of("gptq", 4), PHI)
    tt.convert(tmp_path / "a", tmp_path / "s", overrides={f"{name}.*": "split"}, to="keep")
    tensors = load_file(tmp_path / "s" / "model.safetensors")
    for part, zeros in zip(("gate", "up"), np.split(plain["zeros"].T, 2), strict=True):
        own = {key.rpartition(".")[2]: x for key, x in tensors.items() if f".{part}_proj." in key}
        assert np.array_equal(read(own, "gptq", 4)["zeros"].T, zeros)


def test_what_words_do_not_allow(tmp_path: Path) -> None:
    """Heads of 20 rows in words of 8; another order of rows, which speaks of rows and not of words; a shape that is a number of its own."""
    config = {**PHI, "head_dim": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
    stored, _ = quantised("awq", 4, 8 * 20, HID, 1)
    write(tmp_path / "a", {f"{QKV}.{word}": x for word, x in stored.items()}, told_of("awq", 4), config)
    with pytest.raises(PlanError, match="the layout of a fused tensor is not known") as error:
        tt.plan(tmp_path / "a", "split")
    assert error.value.fields["found"] == "a word holds 8 numbers, and crosses a boundary: d=20 = 8 * 2 + 4"
    fused(tmp_path / "b", "awq", 4)
    with pytest.raises(tt.TriptychError):
        tt.plan(tmp_path / "b", "g (q r|k|v) d")
    fused(tmp_path / "c", "compressed", 4)
    with pytest.raises(PlanError, match="the shape of packed numbers would have to be computed") as error:
        tt.plan(tmp_path / "c", "split")
    assert error.value.fields["tensor"] == f"{QKV}.weight_shape"
    config = {"model_type": "x", "heads": H}
    (tmp_path / "x.toml").write_text('[[family]]\ntypes = ["x"]\nsource = "s"\n[[family.tensor]]\nfused = "qkv_proj"\n'
                                     'layout = "h d (q|k|v)"\nsizes = {h = "heads"}\n')  # fmt: skip
    stored, _ = quantised("awq", 4, 3 * H * D, HID, 1)
    write(tmp_path / "d", {f"{QKV}.{word}": x for word, x in stored.items()}, told_of("awq", 4), config)
    with pytest.raises(PlanError, match="the layout of a fused tensor is not known") as error:
        tt.plan(tmp_path / "d", "split", records=tmp_path / "x.toml")
    assert error.value.fields["found"] == "a word holds 8 numbers, and neighbours in h d (q|k|v) are of several parts or heads"


def test_what_is_left_alone(tmp_path: Path) -> None:
    """Packed numbers are not turned round and not judged by their values; those of no known kind stop nothing that does not touch them."""
    fused(tmp_path / "a", "gptq", 4)
    with pytest.raises(PlanError, match="there is nothing to convert"):
        tt.plan(tmp_path / "a", orientation="linear")
    assert all(one.outcome == "cannot tell" for one in tt.inspect(tmp_path / "a", check_weights=True).agreements)
    stored, _ = quantised("gptq", 4, (H + 2 * G) * D, HID, 1)
    odd = {f"{QKV}.{word}": x for word, x in stored.items() if word != "scales"}
    write(tmp_path / "b", {**odd, f"{QKV}.bias": np.zeros((H + 2 * G) * D, np.float16)}, told_of("gptq", 4), PHI)
    assert [one.name for one in tt.inspect(tmp_path / "b").projections] == [f"{QKV}.bias"]
    with pytest.raises(PlanError, match="a companion of a fused tensor would stay behind"):
        tt.plan(tmp_path / "b", "split")
