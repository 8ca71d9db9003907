"""What the pages show is what the commands print, and what their Python shows is what Python says."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import triptych as tt
from triptych.cli import commands
from triptych.steps import Plan

ROOT = Path(__file__).parent.parent


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


regenerate = script("docs/regenerate.py")


@pytest.mark.parametrize("page", regenerate.pages(), ids=lambda p: p.name)
def test_outputs_on_the_page_are_real(page: Path) -> None:
    assert regenerate.difference(page, regenerate.regenerated) == ""


@pytest.mark.parametrize("page", regenerate.pages(), ids=lambda p: p.name)
def test_python_on_the_page_is_real(page: Path) -> None:
    assert regenerate.difference(page, regenerate.answered) == ""


def test_a_stale_output_is_seen() -> None:
    assert regenerate.regenerated("```console\n$ echo new\nold\n```") == "```console\n$ echo new\nnew\n```"
    assert regenerate.regenerated("```console\n$ exit 3\n```") == "```console\n$ exit 3\nexit code 3\n```"


def test_a_stale_answer_is_seen() -> None:
    assert regenerate.answered("```python\n>>> 1 + 1\n3\n>>> 2 + 2\n```\n") == "```python\n>>> 1 + 1\n2\n>>> 2 + 2\n4\n```\n"
    assert regenerate.answered("  >>> print('a\\n\\nb')\n  c\n") == "  >>> print('a\\n\\nb')\n  a\n  <BLANKLINE>\n  b\n"
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        regenerate.answered("```python\n>>> 1 / 0\n```\n")


def test_links_lead_somewhere() -> None:
    for page in regenerate.pages():
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), (page.name, link)


def test_the_readme_names_every_command_and_what_exists() -> None:
    page = (ROOT / "README.md").read_text()
    lines = page.split("## Command line")[1].split("## Python")[0].splitlines()
    named = {word.split()[0] for line in lines if line.startswith("| `") for word in re.findall("`(.*?)`", line.split("|")[1])}
    assert named == set(commands.commands)
    table = page.split("| for | |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) <= set(tt.__all__)


def test_the_readme_counts_families_as_their_page_does() -> None:
    said = re.search(r"(\d+) of (\d+) types of models.*?(\d+) executed .*?(\d+) through", (ROOT / "README.md").read_text())
    counted = re.search(r"(\d+) of (\d+) types verified by execution, (\d+) through", (ROOT / "docs" / "families.md").read_text())
    assert said is not None and counted is not None
    executed, every, loaded = map(int, counted.groups())
    assert tuple(map(int, said.groups())) == (executed + loaded, every, executed, loaded)


# plan --json


def documented() -> dict[str, set[str]]:
    """First word of each table of the section on `plan --json` -> the keys that it lists."""
    section = (ROOT / "docs" / "checkpoints.md").read_text().split("\n## plan --json\n")[1].split("\n## ")[0]
    tables = [[line.split("|")[1].strip() for line in table.splitlines()] for table in section.split("\n\n") if table.startswith("|")]
    return {first: set(re.findall("`(.*?)`", " ".join(rows))) for first, _, *rows in tables}


def keys(rows: Iterable[dict[str, Any]]) -> set[str]:
    return {key for row in rows for key in row}


def plans(folder: Path) -> list[Plan]:
    """Of every kind: joined, in shards, with an index; rows left out; for ranks, with small files of its own; of a GGUF file."""
    script("examples/small_gqa.py").main(folder / "gqa")
    save_file({"w.bias": np.zeros(24, np.float32)}, folder / "bias.safetensors")
    out = gguf.GGUFWriter(folder / "a.gguf", "gptneox")
    out.add_tensor("blk.0.attn_qkv.weight", np.zeros((36, 4), np.float32))
    for write in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        write()
    return [
        tt.plan(folder / "gqa", "fused:g (q r|k|v) d", rope="interleaved", max_shard_size="40KB"),
        tt.plan(folder / "bias.safetensors", "split", layouts={"w.bias": "(q|k=0|v) h d"}, h=2),
        tt.shard_plan(folder / "gqa", 2, pad_vocab_to=2).plan,
        tt.plan(folder / "a.gguf", "(q|k|v) h d", layouts={"*qkv*": "h (q|k|v) d"}, h=3),
    ]


def test_every_key_of_a_plan_is_documented_and_exists(tmp_path: Path) -> None:
    made = [json.loads(json.dumps(plan.to_dict())) for plan in plans(tmp_path)]
    files = [file for plan in made for file in plan["files"]]
    written = [step for file in files for step in file["steps"]]
    drops = [feed for plan in made for feed in plan["drops"]]
    assert drops and any(len(copy) == 3 for plan in made for copy in plan["copies"])
    assert documented() == {
        "plan": keys(made),
        "file": keys(files),
        "step": keys(written),
        "feed": keys([feed for step in written for feed in step["feeds"]] + drops),
        "change": keys(change for plan in made for change in plan["changes"]),
    }
    assert {plan["version"] for plan in made} == {1}
    assert keys(plan["index"] for plan in made if plan["index"]) == {"name", "sha256"}


def test_the_json_of_a_plan_is_enough_to_do_it(tmp_path: Path) -> None:
    """The bytes that the page says go somewhere, moved one by one, are those of the conversion."""
    made = plans(tmp_path)[0]
    tt.convert(tmp_path / "gqa", tmp_path / "out", "fused:g (q r|k|v) d", rope="interleaved", max_shard_size="40KB")
    for file in json.loads(json.dumps(made.to_dict()))["files"]:
        written = {name: tensor.tobytes() for name, tensor in load_file(tmp_path / "out" / file["name"]).items()}
        assert {step["tensor"]: filled(step, tmp_path / "gqa") for step in file["steps"]} == written


def filled(step: dict[str, Any], folder: Path) -> bytes:
    found = bytearray(step["size"])
    for feed in step["feeds"]:
        source = (folder / feed["file"]).read_bytes()[feed["start"] :][: feed["size"]]
        for out, into, width, dims in feed["nests"]:
            for at in itertools.product(*(range(size) for size, _, _ in dims)):
                to = out + sum(i * dim[1] for i, dim in zip(at, dims, strict=True))
                of = into + sum(i * dim[2] for i, dim in zip(at, dims, strict=True))
                found[to : to + width] = source[of : of + width]
    return bytes(found)
