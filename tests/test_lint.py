"""Every lint rule has a page, a checkpoint that it finds fault with and one that it does not; and lint goes on after damage."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import triptych as tt
from triptych.cli import main
from triptych.errors import FormatError, PlanError
from triptych.formats import Tensor
from triptych.holes import Opened
from triptych.lint import RULES
from triptych.lint.pickles import asked, is_for_tensors, runs_code
from triptych.lint.values import BLOCK, facts

from . import crafted, files, hostile
from .lint_cases import BLOCK as PAGE_BLOCK
from .lint_cases import CASES, DENSE, INDEX, NAMES, NEOX, OPTIONS, PAGES, QKV, halves, healthy, llama, neox, noise, said, sharded, single

ROOT = Path(__file__).parent.parent
RULE_IDS = [rule.id for rule in RULES]


def found(path: Path, **options: Any) -> list[str]:
    return [finding.rule for finding in tt.lint(path, **options).findings]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    out = capsys.readouterr()
    return int(str(done.value.code)), out.out, out.err


# Every rule


def test_every_rule_has_cases_and_a_page_and_no_page_is_left_over() -> None:
    assert sorted(CASES) == sorted(RULE_IDS) and len(set(RULE_IDS)) == len(RULE_IDS)
    assert {page.stem for page in PAGES.glob("*.md")} == {*RULE_IDS, "README"}


@pytest.mark.parametrize("rule", RULE_IDS)
def test_a_rule_finds_its_fault_and_nothing_else(rule: str, tmp_path: Path) -> None:
    bad, good = CASES[rule]
    options = {"check_weights": True} if rule in OPTIONS else {}
    bad(tmp_path / "bad")
    good(tmp_path / "good")
    assert set(found(tmp_path / "bad", **options)) == {rule}
    assert found(tmp_path / "good", **options) == []


@pytest.mark.parametrize("rule", RULE_IDS)
def test_the_page_of_a_rule(rule: str, tmp_path: Path) -> None:
    (one,) = [other for other in RULES if other.id == rule]
    text = (ROOT / one.page).read_text("utf-8")
    assert text.startswith(f"# {one.title}\n\n`{rule}`, {one.severity}")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Why", "Example", "Remedy"]
    (block,) = PAGE_BLOCK.findall(text)
    nats = re.compile(r"\d+ nats")
    assert nats.sub("N nats", block) == nats.sub("N nats", said(rule, tmp_path)), "python -m tests.lint_cases writes it anew"
    assert f"[{rule}]({rule}.md)" in (PAGES / "README.md").read_text("utf-8")


def test_a_healthy_checkpoint_is_clean_and_only_read(tmp_path: Path) -> None:
    healthy(tmp_path / "model")
    before = files.snapshot(tmp_path)
    report = tt.lint(tmp_path / "model")
    assert (report.findings, report.files, report.tensors, report.read) == ((), 2, 7, sum(t.nbytes for t in neox().values()))
    assert str(report).startswith(f"{tmp_path / 'model'}   clean\n")
    assert files.snapshot(tmp_path) == before


# Exit codes and options


def test_exit_codes_are_graded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rule in (("error", "missing-shard"), ("warning", "total-size"), ("clean", "")):
        (CASES[rule][0] if rule else healthy)(tmp_path / name)
    assert run(capsys, "lint", tmp_path / "error")[0] == 1
    assert run(capsys, "lint", tmp_path / "warning")[0] == 0
    assert run(capsys, "lint", tmp_path / "warning", "--strict")[0] == 1
    assert run(capsys, "lint", tmp_path / "clean", "--strict")[0] == 0
    assert run(capsys, "lint", tmp_path / "error", "--ignore", "missing-shard")[0] == 0
    assert run(capsys, "lint", tmp_path / "nowhere")[0] == 3
    code, _, text = run(capsys, "lint", tmp_path / "clean", "--ignore", "mising-shard")
    assert code == 2 and text.startswith("UsageError") and "no rule is called mising-shard" in text and "missing-shard" in text
    with pytest.raises(FormatError, match="an index is not a checkpoint"):
        tt.lint(tmp_path / "clean" / INDEX)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="no weights here"):
        tt.lint(tmp_path / "empty")
    with pytest.raises(PlanError, match="no such rule"):
        tt.lint(tmp_path / "clean", ignore=["x"])


def test_fast_reads_no_numbers_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CASES["not-finite"][0](tmp_path / "model")
    report = tt.lint(tmp_path / "model", fast=True)
    assert (report.findings, report.read) == ((), 0) and "headers only" in str(report)
    assert "not-finite" not in report.to_dict()["rules"]
    assert run(capsys, "lint", tmp_path / "model", "--fast")[0] == 0


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CASES["zero-part"][0](tmp_path / "model")
    code, out, _ = run(capsys, "lint", tmp_path / "model", "--json")
    table = json.loads(out)
    assert code == 1 and (table["version"], table["errors"], table["warnings"], table["tensors"]) == (1, 1, 0, 7)
    assert table["findings"] == [
        {
            "rule": "zero-part",
            "severity": "error",
            "message": "all 24 rows of k are zero",
            "file": "model.safetensors",
            "tensor": QKV.format(1),
        }
    ]


# It goes on


def test_damage_is_one_finding_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    first, second = halves(neox())
    second[DENSE.replace(".0.", ".1.")][2, 3] = np.inf
    sharded(tmp_path / "model", first, second)
    (tmp_path / "model" / "config.json").write_text("{")
    os.truncate(tmp_path / "model" / NAMES[0], 4000)
    report = tt.lint(tmp_path / "model")
    assert [(one.rule, one.file) for one in report.findings if one.rule == "unreadable-file"] == [
        ("unreadable-file", NAMES[0]),
        ("unreadable-file", "config.json"),
    ]
    assert "not-finite" in [one.rule for one in report.findings]
    assert "missing-tensor" not in [one.rule for one in report.findings], "what lies in the damaged file is not missing too"


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 1, "b": "x.safetensors"}}', "nonsense"],
)
def test_an_index_that_makes_no_sense(content: str, tmp_path: Path) -> None:
    healthy(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(content)
    assert "unreadable-file" in found(tmp_path / "model")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 200, 4000])
def test_a_single_file_cut_anywhere(size: int, tmp_path: Path) -> None:
    single(tmp_path / "model", neox())
    os.truncate(tmp_path / "model" / "model.safetensors", size)
    assert found(tmp_path / "model") == ["unreadable-file"] == found(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize("attack", [case for case in hostile.CASES if case.kind != "plan"][::5], ids=lambda case: case.name)
def test_a_hostile_file_gives_findings_or_a_refusal(attack: hostile.Case, tmp_path: Path) -> None:
    place = attack.make(tmp_path)
    try:
        report = tt.lint(place, fast=True)
    except FormatError:
        return
    assert report.findings and all(len(str(report).split("\n")) < 60 and one.message for one in report.findings)


# Numbers


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F64", np.float64), ("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("F8_E5M2", ml_dtypes.float8_e5m2),
     ("F8_E4M3", ml_dtypes.float8_e4m3fn)],
)  # fmt: skip
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_numbers_as_numpy_counts_them(name: str, dtype: Any, axis: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    array = rng.normal(size=(7, 33, 5)).astype(dtype)
    array[2, 4] = 0
    array[:, 4, :] = -0.0
    array[6] = 0
    array[1, 2, 3], array[5, 32, 0], array[0, 0, 1] = np.nan, -np.nan, np.nan
    if name != "F8_E4M3":
        array[3, 3, :2] = np.inf, -np.inf
    (tmp_path / "x").write_bytes(b"head" + array.tobytes())
    file = Opened(tmp_path / "x")
    fact = facts(file, Tensor("x", name, array.shape, "x", 4, 4 + array.nbytes), axis)
    file.close()
    wide = array.astype(np.float64)
    assert (fact.nan, fact.infinite) == (np.isnan(wide).sum(), np.isinf(wide).sum())
    assert np.array_equal(fact.zero, (wide == 0).all(axis=tuple({0, 1, 2} - {axis})))


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    shape = (6 * BLOCK // 4 // 1024, 1024)
    save_file({"w": np.ones(shape, np.float32) * np.arange(1024, dtype=np.float32)}, tmp_path / "model.safetensors")
    tracemalloc.start()
    report = tt.lint(tmp_path / "model.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.read == 6 * BLOCK and peak < 3.5 * BLOCK
    assert [one.rule for one in report.findings] == ["untrained-part"], "the last row was compared with the first one"


def test_zero_rows_of_a_fused_tensor_that_nobody_knows(tmp_path: Path) -> None:
    weight = noise(36, 24, seed=1)
    weight[24:] = 0
    single(tmp_path / "model", {"a.qkv_proj.weight": weight}, None)
    report = tt.lint(tmp_path / "model")
    assert [one.message for one in report.findings if one.rule == "zero-rows"] == ["rows 24 to 35 of 36 along axis 0 are zero"]


def test_a_zero_bias_and_parts_that_are_declared_zero_are_honest(tmp_path: Path) -> None:
    single(tmp_path / "model", neox())
    assert not neox()[QKV.format(0).replace("weight", "bias")].any() and found(tmp_path / "model") == []


# Sets of files


def test_a_shard_alone_is_not_asked_for_the_others(tmp_path: Path) -> None:
    healthy(tmp_path / "model")
    assert found(tmp_path / "model" / NAMES[1]) == []


def test_numbered_shards_without_an_index_promise_each_other(tmp_path: Path) -> None:
    CASES["missing-index"][0](tmp_path / "model")
    (tmp_path / "model" / NAMES[0]).unlink()
    report = tt.lint(tmp_path / "model")
    assert [(one.rule, one.file) for one in report.findings] == [("missing-shard", NAMES[0]), ("missing-index", NAMES[1])]


def test_fewer_layers_than_the_config_says(tmp_path: Path) -> None:
    single(tmp_path / "model", neox(), {**NEOX, "num_hidden_layers": 5})
    (one,) = tt.lint(tmp_path / "model").findings
    assert one.rule == "missing-layer" and one.message == "config.json says 5 layers, and the files have 2"


def test_torch_files_and_their_doubles(tmp_path: Path) -> None:
    single(tmp_path / "model", neox())
    torch.save({name: torch.from_numpy(array) for name, array in neox().items()}, tmp_path / "model" / "pytorch_model.bin")
    assert found(tmp_path / "model") == ["two-weight-sets"]
    (tmp_path / "model" / "model.safetensors").unlink()
    assert found(tmp_path / "model") == []
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(crafted.torch_file(b"cos\nsystem\n(" + crafted.text("true") + b"tR"))
    assert found(tmp_path / "model") == ["unreadable-file", "unsafe-pickle"]


def test_a_killed_conversion(tmp_path: Path) -> None:
    healthy(tmp_path / "model")
    (tmp_path / "model" / ".triptych-unfinished.json").write_text("{}")
    assert found(tmp_path / "model") == ["unfinished"]
    assert [one.rule for one in tt.lint(tmp_path / "model", ignore=["unfinished"]).findings] == []


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (None, "unknown-layout"),
        ({}, "unknown-layout"),
        ({"model_type": "nobody_knows"}, "unknown-layout"),
        ({**NEOX, "num_attention_heads": 5}, "config-shapes"),
        ({**NEOX, "hidden_size": 12}, "config-shapes"),
    ],
)
def test_what_is_not_said_and_what_does_not_fit(config: dict[str, Any] | None, rule: str, tmp_path: Path) -> None:
    single(tmp_path / "model", neox(), config)
    assert set(found(tmp_path / "model")) == {rule}


def test_sizes_that_the_config_does_not_tell(tmp_path: Path) -> None:
    single(tmp_path / "model", {"attn.in_proj_weight": noise(36, 12, seed=1)}, {"model_type": "nobody_knows"})
    (one,) = tt.lint(tmp_path / "model").findings
    assert one.rule == "unknown-layout" and "the config has no" in one.message
    assert found(tmp_path / "model", h=3) == []


def test_a_part_that_is_missing_without_a_record_to_say_so(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    single(tmp_path / "model", {key: value for key, value in llama().items() if key != name}, None)
    (one,) = tt.lint(tmp_path / "model").findings
    assert one.rule == "incomplete-projection" and one.message == "k_proj of this layer is not there; other layers have it"


# Pickles


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 7",)


@pytest.mark.parametrize("protocol", range(6))
def test_names_of_every_protocol(protocol: int) -> None:
    import pickle

    names = asked(pickle.dumps([np.float64(3), Evil(), Path("x")], protocol))
    assert f"{os.system.__module__}.system" in names and any(name.startswith("pathlib") for name in names)
    assert [name for name in names if runs_code(name)] == ["posix.system"]


def test_names_that_hide() -> None:
    computed = b"\x80\x04" + crafted.text("o") + b"\x85\x93."
    assert asked(computed) == ("a name that the pickle computes",) and runs_code("a name that the pickle computes")
    assert asked(b"\x80\x02K\x01.\x80\x02cos\nsystem\n.") == ("os.system",), "a second pickle behind the first"
    assert asked(b"(ios\nsystem\n.") == ("os.system",) and asked(b"c__builtin__\neval\n") == ("builtins.eval",)
    assert asked(b"\x00\x01nonsense") == ()
    assert asked(b"\x80\x02" + b"N0" * (1 << 19) + b"N.") == ("more than this program reads",)


def test_what_torch_itself_saves_is_for_tensors(tmp_path: Path) -> None:
    import zipfile

    table = {"w": torch.zeros(2, 3, dtype=torch.bfloat16), "p": torch.nn.Parameter(torch.ones(2)), "n": 3, "s": torch.Size([1])}
    torch.save(table, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        names = asked(archive.read("a/data.pkl"))
    assert names and all(is_for_tensors(name) and not runs_code(name) for name in names), names


@pytest.mark.parametrize(
    "name",
    ["os.system", "nt.system", "builtins.getattr", "functools.partial", "numpy.testing._private.utils.runstring", "torch.hub.load",
     "torch.storage._load_from_bytes", "multiprocessing.util.spawnv_passfds"],
)  # fmt: skip
def test_names_that_run_code(name: str) -> None:
    assert runs_code(name) and not is_for_tensors(name)
