"""Reading byte ranges: few files open at a time, few pieces of work begun, whatever the checkpoint."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import triptych as tt
from triptych import formats, ranges


def shards(folder: Path, number: int) -> Path:
    """A GPT-NeoX of `number` layers, each in a shard of its own."""
    folder.mkdir()
    weight_map = {}
    for layer in range(number):
        name, file = f"gpt_neox.layers.{layer}.attention.query_key_value.weight", f"model-{layer + 1:05}-of-{number:05}.safetensors"
        save_file({name: np.arange(90, dtype=np.float32).reshape(18, 5) + 100 * layer}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "num_attention_heads": 2, "hidden_size": 6}))
    return folder


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def few_files() -> Iterator[None]:
    """No more open files than two checkpoints may have, and some for the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 2 * ranges.MOST_OPEN + 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    folder = shards(tmp_path / "in", ranges.MOST_OPEN + 40)
    tt.convert(folder, tmp_path / "out", "(q|k|v) h d")
    before = open_files()
    assert tt.verify(folder, tmp_path / "out").rows == 18 * (ranges.MOST_OPEN + 40)
    assert tt.diff(folder, tmp_path / "out").summary.startswith("the same weights")
    assert open_files() == before


def test_files_are_closed_and_opened_again_while_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "MOST_OPEN", 2)
    stored = formats.read(shards(tmp_path / "in", 7))
    with ranges.Ranges(stored) as reader:

        def layer(number: int) -> float:
            tensor = list(stored.tensors.values())[number % 7]
            found = float(reader.read(tensor, 8, 4).view(np.float32)[0] - 2) / 100
            assert len(reader._files) <= 2 + 4, "those that the others read, and two"
            return found

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(layer, range(700))) == [number % 7 for number in range(700)]


def test_work_is_begun_only_so_far_ahead() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5 * ranges.AHEAD):
            asked.append(number)
            yield number

    def work(number: int) -> int:
        assert len(asked) <= number + ranges.AHEAD + ranges.WORKERS
        return number

    assert ranges.in_order(work, items()) == list(range(5 * ranges.AHEAD))
