"""What people do to the command line: jobs from end to end, slips of the hand, files of all kinds; each answer with its way on."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

import triptych as tt
from tests import files
from tests.test_cli import call
from triptych.errors import FormatError, IncompatibleError, LayoutError, PlanError, SizeError, TraceError
from triptych.layout import with_brackets

H, D, IN, RANK = 3, 16, 48, 5
QKV = "gpt_neox.layers.{}.attention.query_key_value."
CONFIG = {"model_type": "gpt_neox", "hidden_size": IN, "num_attention_heads": H}
Tensors = dict[str, tuple[str, tuple[int, ...]]]
NEOX: Tensors = {f"{QKV.format(i)}{end}": ("F16", shape) for i in range(2) for end, shape in (("weight", (144, IN)), ("bias", (144,)))}
LORA: Tensors = {f"base_model.model.{QKV.format(i)}{end}": ("F32", shape) for i in range(2)
        for end, shape in (("lora_A.weight", (RANK, IN)), ("lora_B.weight", (144, RANK)))}  # fmt: skip
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files.checkpoint(tmp_path / "a", [NEOX], CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pasted(error: str, **sizes: int) -> list[str]:
    """The options of the `try` line, with numbers for its words."""
    line = next(line for line in error.splitlines() if line.startswith("  try")).removeprefix("  try").partition(" if ")[0]
    words = {"HEADS": "h", "KV_HEADS": "g", "RANKS": "t"}
    return [f"{axis}={sizes[words[word]]}" if (word := part.partition("=")[2]) in words else part for part in shlex.split(line)
            for axis in [part.partition("=")[0]]]  # fmt: skip


# Layouts that nobody knows


@pytest.mark.parametrize(
    ("names", "shape", "layout", "who"),
    [
        ("transformer.h.{}.attn.c_attn.", (144, IN), "(q|k|v) h d", "nanogpt"),
        ("blocks.{}.attn.qkv.", (144, IN), "(q|k|v) h d", "timm"),
        (QKV, (144, IN), "h (q|k|v) d", "gpt_neox"),
    ],
)
def test_the_layout_line_of_an_unknown_tensor_works_when_it_is_pasted(
    here: Path, capsys: Capture, names: str, shape: tuple[int, int], layout: str, who: str
) -> None:
    ends = (("weight", shape), ("bias", shape[:1]))
    files.checkpoint(here / "b", [{names.format(i) + end: ("F32", its) for i in range(2) for end, its in ends}])
    code, out, err = call(capsys, "plan", "b", "--to", "split")
    assert (code, out) == (4, "") and f"{layout}   ({who}" in err and f"if it is of {who}" in err
    options = pasted(err, h=H)
    assert options[0] == "--layout" and options[2:] == ["-s", f"h={H}"]
    code, out, _ = call(capsys, "plan", "b", "--to", "split", *options)
    assert code == 0 and f"from {names.format('*')}weight   {layout}\n" in out and f"h={H} d={D}" in out


def test_a_layout_is_proposed_where_the_shape_allows_it_alone(here: Path) -> None:
    """[in, out], as GPT-2 has it, is not taken for nanoGPT's [out, in]; of a name that no record has nothing is proposed."""
    files.checkpoint(here / "b", [{"transformer.h.0.attn.c_attn.weight": ("F32", (IN, 144))}])
    with pytest.raises(PlanError) as caught:
        tt.plan(here / "b", "split")
    assert "gpt2" in str(caught.value) and "nanogpt" not in str(caught.value)
    files.checkpoint(here / "c", [{"x.mixed_qkv.weight": ("F32", (144, IN))}])
    with pytest.raises(PlanError, match="if you know it") as caught:
        tt.plan(here / "c", "split")
    assert "expected" not in caught.value.fields


def test_a_size_that_contradicts_the_config(here: Path) -> None:
    for command in (lambda: tt.plan("a", "split", h=4), lambda: tt.convert("a", "b", "(q|k|v) h d", h=4)):
        with pytest.raises(PlanError, match="a size given by hand contradicts the config") as caught:
            command()
        assert "h=3 in the config, h=4 given" in str(caught.value) and not Path("b").exists()


# Brackets


@pytest.mark.parametrize(
    ("text", "meant"),
    [("q|k|v h d", "(q|k|v) h d"), ("q h|k g|v g d", "(q h|k g|v g) d"), ("gate|up f", "(gate|up) f"), ("q h|k h|v h d", "(q h|k h|v h) d"),
     ("q h d|k g d|v g d", ""), ("(q|k|v) h d", ""), ("_ g (q r|k|v) d|gate h", ""), ("z n|dt h d", ""), ("h (q|k|v d)", ""),
     ("q h d|k g d|v g dv", ""), ("(q h d)", "")],
)  # fmt: skip
def test_missing_brackets_are_told_and_change_nothing(text: str, meant: str) -> None:
    layout = tt.Layout(text)
    assert with_brackets(layout) == meant
    assert not meant or tt.Layout(meant).parts == layout.parts
    sizes: dict[str, Any] = {axis: 1 if axis == "g" else 2 for axis in layout.axes if axis != "r"}
    assert ("brackets make axes common" in str(tt.explain(text, **sizes))) == bool(meant)


def test_a_target_without_brackets(here: Path, capsys: Capture) -> None:
    code, _, err = call(capsys, "plan", "a", "--to", "q|k|v h d")
    assert code == 2 and "  try      did you mean (q|k|v) h d?" in err
    files.checkpoint(here / "b", [{"x.qkv.weight": ("F32", (2 + H * D, 7))}])
    by_hand = tt.inspect(here / "b", layouts={"*qkv*": "q|k|v h d"}, h=H)
    assert str(by_hand.projections[0].layout) == "q|k|v h d"
    assert by_hand.notes == ("q|k|v h d gives its last part alone heads and dims: did you mean (q|k|v) h d?",)
    with pytest.raises(SizeError, match=r"did you mean \(q\|k\|v\) h d\?"):
        tt.plan(here / "a" / "model.safetensors", "split", layouts={"*query_key_value*": "q|k|v h d"}, h=H)


def test_an_unknown_axis_is_named_once(here: Path) -> None:
    with pytest.raises(SizeError) as caught:
        tt.plan("a", "(q|k|v) h e")
    assert caught.value.fields["layout"] == "h (q|k|v) d and (q|k|v) h e"


def test_detect_says_what_its_sizes_are_called() -> None:
    with pytest.raises(SizeError, match="detect takes heads and kv_heads") as caught:
        tt.detect(np.zeros((144, IN), np.float32), h=H, g=1)
    assert caught.value.fields["try"] == "heads=3, kv_heads=1"


def test_paths_where_tensors_or_modules_are_wanted(here: Path) -> None:
    with pytest.raises(LayoutError, match="this is no tensor") as caught:
        tt.detect("a/model.safetensors")
    assert "detect_checkpoint" in str(caught.value)
    with pytest.raises(TraceError, match="probe takes a module, or a config"):
        tt.probe("a")


# Packed numbers and what stands beside weights

PHI = {"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
FUSED = "model.layers.0.self_attn.qkv_proj"


def test_packed_numbers_keep_their_order(here: Path) -> None:
    (here / "b").mkdir()
    (here / "b/config.json").write_text(json.dumps({**PHI, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}))
    ints = {f"{FUSED}.{word}": torch.zeros(shape, dtype=torch.int32)
            for word, shape in (("qweight", (8, 128)), ("qzeros", (2, 16)), ("g_idx", (64,)))}  # fmt: skip
    save_file(ints | {f"{FUSED}.scales": torch.ones(2, 128, dtype=torch.float16)}, here / "b/model.safetensors")
    with pytest.raises(PlanError, match="packed numbers keep the order of their rows") as caught:
        tt.plan("b", "g (q r|k|v) d")
    assert "--to split" in str(caught.value)
    assert len(tt.plan("b", "split").changes) == 4


def test_scales_of_rows_are_named_after_the_parts(here: Path, capsys: Capture) -> None:
    """bitsandbytes' SCB has one number for each row, and no record: the line of the error works, and each part gets its own."""
    shapes: Tensors = {f"{FUSED}.weight": ("U8", (128, 64)), f"{FUSED}.SCB": ("F32", (128,))}
    made = files.checkpoint(here / "b", [shapes], PHI)
    code, _, err = call(capsys, "convert", "b", "c", "--to", "split")
    assert code == 4 and "a companion of a fused tensor would stay behind" in err
    options = shlex.split(next(line for line in err.splitlines() if line.startswith("  try")).partition("rows: ")[2])
    assert call(capsys, "convert", "b", "c", "--to", "split", *options)[0] == call(capsys, "verify", "b", "c", *options)[0] == 0
    parts = [f"model.layers.0.self_attn.{part}_proj.SCB" for part in "qkv"]
    assert b"".join(files.read(here / "c")[part] for part in parts) == made[f"{FUSED}.SCB"]


# Adapters


def test_an_adapter_moves_with_the_rows_of_its_base(here: Path) -> None:
    """What an adapter adds to a fused weight, moved, is what the moved adapter adds; the oracle is a product of matrices in torch."""
    made = files.checkpoint(here / "lora", [LORA])
    with pytest.raises(PlanError, match="layout of a fused tensor is not known"):
        tt.convert(here / "lora", here / "b", "(q|k|v) h d")
    by_hand = {"*.lora_B.*": "h (q|k|v) d"}
    tt.convert(here / "lora", here / "b", "(q|k|v) h d", layouts=by_hand, h=H)
    tt.verify(here / "lora", here / "b", layouts=by_hand, h=H)
    moved = files.read(here / "b")
    for i in range(2):
        a, b = (f"base_model.model.{QKV.format(i)}lora_{side}.weight" for side in "AB")
        assert moved[a] == made[a]
        ours, theirs = (torch.frombuffer(bytearray(one[b]), dtype=torch.int32).view(144, RANK) for one in (moved, made))
        assert torch.equal(ours, theirs.view(H, 3, D, RANK).transpose(0, 1).reshape(144, RANK))


def test_an_adapter_is_not_taken_apart(here: Path) -> None:
    """Its parts would be adapters without the side of the inputs, under names that nobody reads."""
    files.checkpoint(here / "lora", [LORA])
    with pytest.raises(PlanError, match="tensors inside a fused module are not taken apart"):
        tt.plan(here / "lora", "split", layouts={"*.lora_B.*": "h (q|k|v) d"}, h=H)


@pytest.mark.parametrize("inside", ["base_layer.weight", "lora_B.default.weight", "_orig_mod.weight", "parametrizations.weight.original",
                                    "_fsdp_wrapped_module.weight", "lora_magnitude_vector", "weight_orig"])  # fmt: skip
def test_some_layers_wrapped_stop_the_plan(here: Path, inside: str) -> None:
    """Else the layers that are not wrapped would be converted, and the others would stay as they are."""
    files.checkpoint(here / "b", [NEOX | {f"{QKV.format(2)}{inside}": ("F16", (144, IN))}], CONFIG)
    with pytest.raises(PlanError, match="layout of a fused tensor is not known") as caught:
        tt.convert("b", "c", "(q|k|v) h d")
    assert inside.split(".")[0] in str(caught.value) and not Path("c").exists()
    assert list(tt.inspect("b").unknown) == [f"{QKV.format(2)}{inside}"]


@pytest.mark.parametrize("inside", [".base_layer.weight", ".parametrizations.weight.original0", ".weight_orig"])
def test_one_layer_wrapped_stops_the_plan_of_separate_projections(here: Path, inside: str) -> None:
    """All of q, k and v of one layer: no part is missing elsewhere, and that layer would stay as it is."""
    config = {"model_type": "llama", "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    shapes: Tensors = {f"model.layers.{i}.self_attn.{part}_proj{inside if i else '.weight'}": ("F16", (rows, 40))
                       for i in range(2) for part, rows in (("q", 48), ("k", 16), ("v", 16))}  # fmt: skip
    files.checkpoint(here / "b", [shapes], config)
    for to, rope in ((None, "interleaved"), ("fused", None)):
        with pytest.raises(PlanError, match="layout of a fused tensor is not known"):
            tt.plan("b", to, rope=rope)
    assert len(tt.inspect("b").unknown) == 3


def test_an_adapter_of_separate_projections_is_left_alone(here: Path) -> None:
    more: Tensors = {"model.layers.0.self_attn.q_proj.lora_B.weight": ("F16", (48, 2)), f"{QKV.format(0)}lora_A.weight": ("F16", (2, 48))}
    files.checkpoint(here / "b", [{"other.weight": ("F16", (3, 4))} | more], CONFIG)
    assert not tt.inspect("b").unknown


# Places and files


def test_an_empty_argument_is_no_folder(here: Path, capsys: Capture) -> None:
    """A variable that is not set would be the folder one stands in."""
    (here / "a").rename(here / "b")
    for file in (here / "b").iterdir():
        shutil.copy(file, here)
    for arguments in (("inspect", ""), ("convert", "", "out", "--to", "split"), ("convert", "b", "", "--to", "split")):
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (2, "") and "an argument is empty" in err


def test_an_unfinished_output_is_no_input(here: Path, capsys: Capture) -> None:
    assert call(capsys, "convert", "a", "b", "--to", "split", "--share", "1/2", "--progress", "none")[0] == 0
    for command in (
        ("inspect", "b"),
        ("plan", "b", "--to", "keep", "--rope", "half"),
        ("verify", "a", "b"),
        ("diff", "a", "b"),
        ("detect", "b"),
    ):
        code, out, err = call(capsys, *command)
        assert (code, out) == (3, "") and "unfinished conversion" in err
    assert call(capsys, "convert", "a", "b", "--to", "split", "--share", "2/2", "--finish")[:2] == (2, "")
    assert call(capsys, "convert", "a", "b", "--to", "split", "--progress", "none")[0] == 0
    assert call(capsys, "verify", "a", "b")[0] == 0


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.gguf"])
def test_what_was_not_fetched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(FormatError, match="pointer of git-lfs") as caught:
        tt.inspect(tmp_path)
    assert caught.value.fields == {"file": str(tmp_path / name), "try": "git lfs pull"}
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FormatError, match="the file is empty"):
        tt.inspect(tmp_path)


def test_errors_name_the_side_that_cannot_be_read(here: Path, capsys: Capture) -> None:
    shutil.copytree("a", "b")
    (here / "b" / "config.json").write_text("{")
    for command in ("diff", "verify"):
        assert "  file     b/config.json" in call(capsys, command, "a", "b")[2]
    shutil.copy("a/config.json", "b")
    (here / "b" / "model.safetensors").write_bytes((here / "a" / "model.safetensors").read_bytes()[:-1])
    for command in ("diff", "verify"):
        code, _, err = call(capsys, command, "a", "b")
        assert code == 3 and "  file     b/model.safetensors" in err


def test_folders_of_ranks_are_merged_first(here: Path) -> None:
    """The `try` lines lead from the folder of a run to the one of a step, and on to `merge`."""
    for rank in range(2):
        files.checkpoint(here / f"run/iter_0000010/mp_rank_0{rank}", [{"a.weight": ("F16", (4, 6))}])
    with pytest.raises(FormatError, match="no checkpoint in this folder") as caught:
        tt.inspect("run")
    step = str(caught.value.fields["try"])
    with pytest.raises(FormatError, match="no checkpoint in this folder") as caught:
        tt.inspect(step)
    assert caught.value.fields["try"] == f"triptych merge {step} OUT" == "triptych merge run/iter_0000010 OUT"


def test_the_cache_of_the_hub_has_its_snapshots_below(here: Path) -> None:
    (here / "models--x" / "blobs").mkdir(parents=True)
    (here / "models--x" / "snapshots").mkdir()
    shutil.move("a", "models--x/snapshots/0123")
    with pytest.raises(FormatError, match="no checkpoint in this folder") as caught:
        tt.inspect("models--x")
    assert tt.inspect(str(caught.value.fields["try"])).projections


def test_a_certificate_that_cannot_be_written(here: Path, capsys: Capture) -> None:
    tt.convert("a", "b", "split")
    code, _, err = call(capsys, "verify", "a", "b", "--certificate", "none/x.json", "--json")
    told = json.loads(err)
    assert (code, told["error"], told["what"], told["where"]) == (4, "OutputError", "the certificate cannot be written", "none/x.json")


# diff


def test_tensors_of_ones_are_not_paired_by_their_content(tmp_path: Path) -> None:
    """Norms that were never trained say nothing of what they belong to."""
    ones, zeros, noise = (
        np.ones(40, np.float32),
        np.zeros(40, np.float32),
        np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32),
    )
    save_arrays({"a.norm.weight": ones, "a.norm.bias": zeros, "w": noise, "moved": noise[::-1].copy()}, tmp_path / "a.safetensors")
    save_arrays({"b.scale.g": ones, "b.scale.b": zeros, "w": noise, "elsewhere": noise[::-1].copy()}, tmp_path / "b.safetensors")
    found = tt.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert sorted((one.a, one.b, one.kind) for one in found.tensors) == [
        ((), ("b.scale.b",), "only in b"), ((), ("b.scale.g",), "only in b"), (("a.norm.bias",), (), "only in a"),
        (("a.norm.weight",), (), "only in a"), (("moved",), ("elsewhere",), "equal"), (("w",), ("w",), "equal"),
    ]  # fmt: skip


def test_constants_are_not_said_to_be_exchanged(tmp_path: Path) -> None:
    ones, noise = np.ones(40, np.float32), np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    save_arrays({"one.weight": ones, "two.weight": noise[0]}, tmp_path / "a.safetensors")
    save_arrays({"one.weight": noise[1], "two.weight": ones}, tmp_path / "b.safetensors")
    assert "another tensor" not in str(tt.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))


def test_a_link_to_nothing_is_called_that(here: Path) -> None:
    (here / "a/vocab.json").symlink_to("../blobs/none")
    with pytest.raises(FormatError, match="a link to nothing") as caught:
        tt.convert("a", "b", "split")
    assert caught.value.fields["file"] == "a/vocab.json" and not Path("b").exists()


def test_ranks_of_a_folder_that_is_not_there(here: Path) -> None:
    with pytest.raises(FormatError, match="no such file or folder"):
        tt.merge("none", "b")


@pytest.mark.parametrize(("to", "meant"), [("(q|k|v) h d", "(q h|k g|v g) d"), ("h (q|k|v) d", "g (q r|k|v) d")])
def test_a_target_for_as_many_kv_heads_as_heads(here: Path, to: str, meant: str) -> None:
    """The usual slip with grouped heads; what the `try` line names works."""
    files.checkpoint(here / "b", [{f"{FUSED}.weight": ("F16", (128, 64))}], PHI)
    with pytest.raises(IncompatibleError, match="do not label the same rows") as caught:
        tt.plan("b", to)
    assert caught.value.fields["try"] == f"did you mean {meant}?"
    if meant != "(q h|k g|v g) d":  # the order that it has
        assert tt.plan("b", meant).changes


def test_sizes_that_follow_from_others_are_not_asked_for() -> None:
    for text, given, wanted in (
        ("t (q n r|k n|v n) d", "g d", "t r"),
        ("(q|k|v) h c p", "h", "p"),
        ("g (q r|k|v) d", "h", "g d"),
        ("m (q|v|k) n d", "h d", "m"),
    ):
        sizes: dict[str, Any] = dict.fromkeys(given.split(), 8)
        with pytest.raises(SizeError, match="sizes are missing") as caught:
            tt.explain(text, **sizes)
        asked = " ".join(f"-s {axis}=NUMBER" for axis in wanted.split())
        assert str(caught.value.fields["try"]).endswith(f"line {asked}"), caught.value
