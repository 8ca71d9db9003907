"""One plan, several engines: threads, shares of a job array, a Ray cluster of worker processes. The bytes are the same."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

import triptych as tt
from triptych import output, portions
from triptych.output import output_of
from triptych.place import MARKER
from triptych.progress import Lines
from triptych.steps import OutFile

from . import files, remote_servers
from .remote_servers import Bucket
from .test_convert import NEOX, neox

TO = "(q|k|v) h d"
server, bucket = remote_servers.server, remote_servers.bucket


@pytest.fixture
def source(tmp_path: Path) -> Path:
    files.checkpoint(tmp_path / "a", neox(5), NEOX)
    (tmp_path / "a" / "more").mkdir()
    (tmp_path / "a" / "more" / "words.txt").write_text("words")
    return tmp_path / "a"


def test_shares_then_finish(source: Path, tmp_path: Path) -> None:
    tt.convert(source, tmp_path / "b", TO)
    done = [tt.convert(source, tmp_path / "c", TO, share=(i, 3)) for i in (2, 3, 1)]
    assert sorted(name for one in done for name in one.files) == sorted(
        set(files.snapshot(tmp_path / "b")) - {"model.safetensors.index.json"}
    )
    assert (tmp_path / "c" / MARKER).exists() and not (tmp_path / "c" / "model.safetensors.index.json").exists()
    again = tt.convert(source, tmp_path / "c", TO, share=(2, 3))
    assert set(again.kept) == set(again.files) == set(done[0].files)
    tt.convert(source, tmp_path / "c", TO, finish=True)
    assert files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "b")


def test_shares_at_once(source: Path, tmp_path: Path) -> None:
    tt.convert(source, tmp_path / "b", TO)
    command = [sys.executable, "-m", "triptych.cli", "convert", str(source), str(tmp_path / "c"), "--to", TO]
    runs = [subprocess.Popen([*command, "--share", f"{i}/4"], stdout=subprocess.PIPE, text=True) for i in range(1, 5)]
    for i, run in enumerate(runs):
        assert f"share {i + 1} of 4" in run.communicate()[0] and run.returncode == 0
    assert subprocess.run([*command, "--finish"], capture_output=True).returncode == 0
    assert files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "b")


def test_a_share_that_is_missing(source: Path, tmp_path: Path) -> None:
    tt.convert(source, tmp_path / "c", TO, share=(1, 2))
    before = files.snapshot(tmp_path / "c")
    with pytest.raises(tt.PlanError, match="shares are missing"):
        tt.convert(source, tmp_path / "c", TO, finish=True)
    assert files.snapshot(tmp_path / "c") == before
    with pytest.raises(tt.PlanError, match="another conversion is unfinished"):
        tt.convert(source, tmp_path / "c", "split", share=(2, 2))
    with pytest.raises(tt.PlanError, match="shares are missing"):
        tt.convert(source, tmp_path / "e", TO, finish=True)
    assert not (tmp_path / "e").exists()
    for share in ((0, 2), (3, 2)):
        with pytest.raises(tt.PlanError, match="no such share"):
            tt.convert(source, tmp_path / "d", TO, share=share)
    with pytest.raises(tt.PlanError, match="single file"):
        tt.convert(
            next(source.glob("*.safetensors")), tmp_path / "d.safetensors", TO, share=(1, 2), layouts={"*query_key_value*": "h (q|k|v) d"}
        )


def test_a_share_that_is_started_twice(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that starts a job again while the first one lives: the second is refused, and takes nothing from the first."""
    monkeypatch.setattr(output, "PATIENCE", 0.2)
    begun, go = threading.Event(), threading.Event()

    def stop(size: int) -> None:
        begun.set()
        assert go.wait(60)

    first = threading.Thread(target=lambda: tt.convert(source, tmp_path / "c", TO, share=(1, 1), progress=stop, workers=1))
    first.start()
    try:
        assert begun.wait(60)
        before = files.snapshot(tmp_path / "c")
        for share in ((1, 1), (1, 2)):
            with pytest.raises(tt.PlanError, match="another run is writing this file") as caught:
                tt.convert(source, tmp_path / "c", TO, share=share)
            assert caught.value.exit_code == 4
        assert before.items() <= files.snapshot(tmp_path / "c").items(), "what the first one has begun is as it was"
        with pytest.raises(tt.PlanError, match="another run is writing this output"):
            tt.convert(source, tmp_path / "c", TO, finish=True)
    finally:
        go.set()
        first.join()
    tt.convert(source, tmp_path / "c", TO, finish=True)
    tt.convert(source, tmp_path / "b", TO)
    assert files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "b")


# Files in parts


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "LEAST", 0)


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    files.checkpoint(tmp_path / "a", neox(5), NEOX)
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for path in (*shards, tmp_path / "a" / "model.safetensors.index.json"):
        path.unlink()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    return tmp_path / "a"


def loads(made: tt.Plan, ways: int) -> list[int]:
    return [sum(task.size for task in mine) for mine in portions.deal(portions.tasks_of(output_of(made)), ways)]


@pytest.mark.parametrize("ways", [2, 3, 4])
def test_one_file_is_divided_among_shares(one_file: Path, tmp_path: Path, ways: int, divided: None) -> None:
    tt.convert(one_file, tmp_path / "b", TO, workers=1)
    dealt = loads(tt.plan(one_file, TO, tmp_path / "c"), ways)
    tensors = [step.size for file in tt.plan(one_file, TO).files for step in file.steps]
    assert max(dealt) <= sum(dealt) / ways + max(tensors)
    for i in range(ways, 0, -1):
        with pytest.raises(tt.PlanError, match="shares are missing"):
            tt.convert(one_file, tmp_path / "c", TO, finish=True)
        done = tt.convert(one_file, tmp_path / "c", TO, share=(i, ways))
        assert done.size == dealt[i - 1] and not (tmp_path / "c" / "model.safetensors").exists()
    assert len(list((tmp_path / "c").glob(".triptych-share-*.json"))) == ways
    again = tt.convert(one_file, tmp_path / "c", TO, share=(1, ways))
    assert set(again.kept) == set(again.files)
    tt.convert(one_file, tmp_path / "c", TO, finish=True)
    assert files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "b")


def test_divided_shares_at_once(one_file: Path, tmp_path: Path) -> None:
    tt.convert(one_file, tmp_path / "b", TO)
    code = (
        "import sys, triptych as tt; from triptych import portions; portions.LEAST = 0; "
        f"tt.convert(sys.argv[1], sys.argv[2], {TO!r}, share=(int(sys.argv[3]), 3))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(one_file), str(tmp_path / "c"), str(i)]) for i in (1, 2, 3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    tt.convert(one_file, tmp_path / "c", TO, finish=True)
    assert files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "b")


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_write_one_file_together(one_file: Path, tmp_path: Path, workers: int, divided: None) -> None:
    tt.convert(one_file, tmp_path / "b", TO, workers=1)
    seen: list[int] = []
    tt.convert(one_file, tmp_path / "c", TO, workers=workers, progress=seen.append)
    assert files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "b") and sum(seen) > 0
    alone = {"layouts": {"*query_key_value*": "h (q|k|v) d"}, "h": 3}
    for name, many in (("d", 1), ("e", workers)):
        (tmp_path / name).mkdir()
        tt.convert(one_file / "model.safetensors", tmp_path / name / "x.safetensors", TO, workers=many, **alone)
    assert files.snapshot(tmp_path / "d") == files.snapshot(tmp_path / "e") and len(files.snapshot(tmp_path / "e")) == 1


def test_files_that_balance_stay_whole(source: Path, divided: None) -> None:
    tasks = portions.tasks_of(output_of(tt.plan(source, TO)))
    for ways in range(1, 9):
        dealt = portions.deal(tasks, ways)
        whole = portions._dealt(tasks, ways)[1]
        if max(whole) <= 1.1 * sum(whole) / ways:
            assert not any(task.total for mine in dealt for task in mine)
        steps = [step.tensor for mine in dealt for task in mine if isinstance(task.item, OutFile) for step in task.item.steps]
        assert sorted(steps) == sorted(step.tensor for task in tasks if isinstance(task.item, OutFile) for step in task.item.steps)


def test_a_record_holds_as_long_as_its_file(one_file: Path, tmp_path: Path, divided: None) -> None:
    """A file in parts that was removed is made anew, and no record speaks of it; a run without shares takes over and leaves nothing."""
    tt.convert(one_file, tmp_path / "b", TO, workers=1)
    tt.convert(one_file, tmp_path / "c", TO, share=(1, 2))
    (tmp_path / "c" / ".model.safetensors.triptych-parts").unlink()
    tt.convert(one_file, tmp_path / "c", TO, share=(2, 2))
    with pytest.raises(tt.PlanError, match="share 1 of 2"):
        tt.convert(one_file, tmp_path / "c", TO, finish=True)
    for workers in (1, 2):
        shutil.copytree(tmp_path / "c", tmp_path / f"c{workers}")
        tt.convert(one_file, tmp_path / f"c{workers}", TO, workers=workers)
        assert files.snapshot(tmp_path / f"c{workers}") == files.snapshot(tmp_path / "b")
    tt.convert(one_file, tmp_path / "c", TO, share=(1, 2))
    tt.convert(one_file, tmp_path / "c", TO, share=(2, 3))
    tt.convert(one_file, tmp_path / "c", TO, finish=True)
    assert files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "b")


# Ray


@pytest.fixture(scope="module")
def cluster(server: Bucket) -> object:
    """Two workers, with the environment of the store."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def test_on_ray(source: Path, tmp_path: Path, cluster: object) -> None:
    from triptych.run_ray import on_ray

    tt.convert(source, tmp_path / "b", TO)
    seen: list[int] = []
    done = tt.convert(source, tmp_path / "c", TO, engine=on_ray(), progress=seen.append)
    assert files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "b") and tt.verify(source, tmp_path / "c").projections == len(
        done.plan.changes
    )
    assert sum(seen) >= sum(file.data_size for file in done.plan.files)
    (tmp_path / "d").mkdir()
    with pytest.raises(tt.FormatError, match="a source file was changed"):
        tt.convert(source, tmp_path / "d", TO, engine=lambda tasks, tick: (os.utime(source / "config.json"), on_ray()(tasks, tick))[1])
    assert not any((tmp_path / "d").iterdir())


def test_a_killed_ray_worker(source: Path, tmp_path: Path, cluster: object) -> None:
    """Workers are killed while they write; their files are begun again elsewhere."""
    from triptych.run_ray import on_ray

    for i in range(4):
        (source / f"large-{i}.data").write_bytes(os.urandom(40_000_000))
    killed: list[int] = []
    over = threading.Event()

    def hunt() -> None:
        while not over.is_set() and len(killed) < 2:
            for part in (tmp_path / "c").glob(".*.triptych-part"):
                for process in psutil.process_iter():
                    with contextlib.suppress(psutil.Error):
                        if (
                            "ray::" in process.name()
                            and process.pid not in killed
                            and str(part) in {file.path for file in process.open_files()}
                        ):
                            process.kill()
                            killed.append(process.pid)
            time.sleep(0.002)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        tt.convert(source, tmp_path / "c", TO, engine=on_ray())
    finally:
        over.set()
        hunter.join()
    tt.convert(source, tmp_path / "b", TO)
    assert killed and files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "b")


def test_a_ray_worker_killed_in_an_upload(source: Path, tmp_path: Path, cluster: object, bucket: Bucket) -> None:
    """From a store to a store: the object is begun again elsewhere, and the upload that was left half-way is ended."""
    from triptych.run_ray import on_ray

    (source / "large.data").write_bytes(os.urandom(40_000_000))
    bucket.put("a/", files.snapshot(source))
    killed: list[int] = []
    over = threading.Event()

    def hunt() -> None:
        while not over.is_set() and not killed:
            if "c/large.data" in bucket.uploads():
                for process in psutil.process_iter():
                    with contextlib.suppress(psutil.Error):
                        if process.name().startswith("ray::_do"):
                            process.kill()
                            killed.append(process.pid)
            time.sleep(0.01)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        tt.convert("s3://bucket/a", "s3://bucket/c", TO, engine=on_ray())
    finally:
        over.set()
        hunter.join()
    tt.convert(source, tmp_path / "b", TO)
    assert killed and bucket.snapshot("c/") == files.snapshot(tmp_path / "b")


def test_progress_lines() -> None:
    out = io.StringIO()
    lines = Lines(1000, True, out)
    for size in (300, 700):
        lines.tick(size)
    lines.show()
    told = json.loads(out.getvalue())
    assert (told["done"], told["total"], told["remaining"]) == (1000, 1000, 0.0)
    out = io.StringIO()
    plain = Lines(4_000_000, False, out)
    plain.tick(1_000_000)
    plain.show()
    assert out.getvalue().startswith("1 MB of 4 MB (25 %)   ") and out.getvalue().rstrip().endswith(" s left")
