"""What one machine shows of a conversion of 1 TB on many: plan, one share of 200, finish; and the model that follows for 1 to 100 machines.

    python bench/scale.py [--write]         with --write the tables go into docs/scale.md

Input: the sparse checkpoint of inspect_terabyte.py (200 shards of 5.2 GB). One share is written for real (5.2 GB of room) and removed; its
fused tensors hold labelled rows and are compared with NumPy's own permutation of them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pickle
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE / "src"), str(HERE / "bench")]

import inspect_terabyte as terabyte  # noqa: E402

import triptych as tt  # noqa: E402
from triptych import portions, run  # noqa: E402
from triptych.formats import header_bytes, index_bytes, read_header  # noqa: E402
from triptych.output import output_of  # noqa: E402
from triptych.steps import Plan  # noqa: E402

TO, SHARE, FILES = "(q|k|v) h d", 7, 400
PAGE, BEGIN, END = HERE / "docs" / "scale.md", "<!-- scale -->\n", "<!-- end of scale -->\n"
BENCH = HERE / ".bench"
NODES = (1, 2, 5, 10, 20, 50, 100, 200, 400)
NODE, SHARED = 1.0, (5.0, 20.0, 200.0)
"""Assumed, GB/s of output: what one machine copies, what the storage that all share takes from all of them (three examples)."""


@dataclass(frozen=True)
class Seen:
    """What was measured. Seconds, bytes, MB of resident memory."""

    tensors: int
    size: int
    plan: float
    plan_cpu: float
    plan_rss: float
    digest: float
    digest_cpu: float
    finer: float
    finer_files: int
    file: int
    share: float
    share_cpu: float
    copy: float
    read: float
    task: int
    task_time: float
    each: float
    busiest: tuple[tuple[int, int], ...]


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a function gives, its seconds of wall time and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = work()
    return out, time.perf_counter() - wall, time.process_time() - cpu


def peak() -> float:
    """Largest resident memory of this process so far, in MB."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def labelled(folder: Path, made: Plan) -> Path:
    """Give every row of the share's fused weights a label of its own, in the input, and say which file that is."""
    dealt = portions.deal(portions.tasks_of(output_of(made)), len(made.files))
    name = min(task.name for task in dealt[SHARE - 1] if task.name.endswith(".safetensors"))
    header, rows = read_header(folder / name), 3 * terabyte.HIDDEN
    before = (folder / name).stat()
    with (folder / name).open("r+b") as file:
        for tensor in header.tensors:
            if tensor.name.endswith("query_key_value.weight"):
                file.seek(tensor.start)
                file.write(np.repeat(np.arange(rows, dtype="<u2"), terabyte.HIDDEN).tobytes())
    os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    return folder / name


def proven(out: Path) -> int:
    """How many fused weights of a written file hold the rows of `h (q|k|v) d` as `(q|k|v) h d`. Stops at one that does not."""
    rows, dim = 3 * terabyte.HIDDEN, terabyte.HIDDEN // terabyte.HEADS
    want = np.arange(rows, dtype="<u2").reshape(terabyte.HEADS, 3, dim).transpose(1, 0, 2).ravel()
    found = 0
    for tensor in read_header(out).tensors:
        if tensor.name.endswith("query_key_value.weight"):
            got = np.fromfile(out, "<u2", rows * terabyte.HIDDEN, offset=tensor.start).reshape(rows, terabyte.HIDDEN)
            if not (got == want[:, None]).all():
                raise SystemExit(f"wrong rows in {tensor.name}")
            found += 1
    return found


def without_cache(path: Path) -> None:
    """Forget what the page cache holds of a file."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_all(path: Path) -> None:
    buffer = bytearray(1 << 21)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def copied(source: Path, out: Path) -> None:
    """`cp` by read and write, preallocated and synced."""
    buffer = memoryview(bytearray(1 << 20))
    with source.open("rb", buffering=0) as file, out.open("wb", buffering=0) as to:
        os.posix_fallocate(to.fileno(), 0, source.stat().st_size)
        while n := file.readinto(buffer):
            to.write(buffer[:n])
        os.fsync(to.fileno())


def small_files(folder: Path) -> float:
    """Seconds for each file of a conversion whose files hold next to nothing: making, syncing, renaming, syncing the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weight_map = {}
    for number in range(FILES):
        name, file = f"gpt_neox.layers.{number}.attention.query_key_value.bias", f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        (folder / file).write_bytes(header_bytes([(name, "BF16", (24,), 0, 48)], {}) + bytes(48))
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_bytes(index_bytes(weight_map, 48 * FILES, {}))
    out = folder.with_name(folder.name + "-out")
    shutil.rmtree(out, ignore_errors=True)
    made = tt.plan(folder, TO, out, layouts={"*query_key_value*": "h (q|k|v) d"}, h=2)
    _, wall, _ = timed(lambda: run.run(made, workers=1))
    shutil.rmtree(folder)
    shutil.rmtree(out)
    return wall / FILES


def measure() -> Seen:
    folder, out, copy_of = terabyte.checkpoint(BENCH / "terabyte"), BENCH / "terabyte-out", BENCH / "terabyte-copy"
    shutil.rmtree(out, ignore_errors=True)
    # told its output place, `plan` would refuse: the disk has no room for 1 TB
    made, plan, plan_cpu = timed(lambda: replace(tt.plan(folder, TO), out=str(out)))
    _, digest, digest_cpu = timed(lambda: made.headers)
    rss = peak()
    source = labelled(folder, made)
    done, share, share_cpu = timed(lambda: run.run(made, share=(SHARE, len(made.files)), workers=1))
    if source.name not in done.files or not proven(out / source.name):
        raise SystemExit("the share is not what it should be")
    without_cache(out / source.name)
    _, read, _ = timed(lambda: read_all(out / source.name))
    size = (out / source.name).stat().st_size
    shutil.rmtree(out)
    _, copy, _ = timed(lambda: copied(source, copy_of))
    copy_of.unlink()
    task = next(task for task in portions.tasks_of(output_of(made)) if task.name == source.name)
    sent, _, task_time = timed(lambda: pickle.dumps(task, protocol=5))
    fine, finer, _ = timed(lambda: tt.plan(folder, TO, max_shard_size="1GB"))
    tensors = sum(len(file.steps) for file in made.files)
    return Seen(tensors, made.size, plan, plan_cpu, rss, digest, digest_cpu, finer, len(fine.files), size, share, share_cpu, copy, read,
                len(sent), task_time, small_files(BENCH / "small-files"), busiest(made))  # fmt: skip


def busiest(made: Plan) -> tuple[tuple[int, int], ...]:
    """For each number of machines, the bytes and the files or parts of files of the one that has most to do."""
    tasks = portions.tasks_of(output_of(made))
    shares = (portions.deal(tasks, machines) for machines in NODES)
    return tuple((max(sum(task.size for task in mine) for mine in dealt), max(map(len, dealt))) for dealt in shares)


def model(seen: Seen, shared: float, busiest: tuple[int, int], plans: int) -> float:
    """Seconds of a conversion on machines of which none does anything else. `plans`: one after the other.

    Machines write at once, each its share; the one with most to do ends last, and the storage takes no more than it takes.
    """
    size, files = busiest
    writing = max(seen.size / shared / 1e9, size / NODE / 1e9 + files * seen.each)
    return plans * (seen.plan_cpu + seen.digest_cpu) + writing


def report(seen: Seen) -> str:
    rate = seen.file / seen.share / 1e9
    lines = [
        f"{datetime.date.today()}, {platform.system()}, Python {platform.python_version()}, {os.cpu_count()} cores shared with other work.",
        "",
        f"| measured: {seen.size / 1e12:.2f} TB, 200 files, {seen.tensors} tensors | |",
        "|---|---:|",
        f"| plan: read and check all headers, plan, check the plan | {seen.plan:.1f} s ({seen.plan_cpu:.1f} s of CPU) |",
        f"| its digest and the 200 new headers | {seen.digest:.1f} s ({seen.digest_cpu:.1f} s of CPU) |",
        f"| resident memory, plan and headers | {seen.plan_rss:.0f} MB |",
        f"| the same plan with `--max-shard-size 1GB` ({seen.finer_files} files) | {seen.finer:.1f} s |",
        f"| share {SHARE} of 200, one worker: {seen.file / 1e9:.2f} GB written, synced, renamed | {seen.share:.1f} s, {rate:.2f} GB/s "
        f"({seen.share_cpu:.1f} s of CPU) |",
        f"| copy of the same file, preallocated and synced | {seen.copy:.1f} s, {seen.file / seen.copy / 1e9:.2f} GB/s |",
        f"| reading what was written, not cached | {seen.read:.1f} s, {seen.file / seen.read / 1e9:.2f} GB/s |",
        f"| a file of next to nothing: make, sync, rename, sync the folder | {1000 * seen.each:.1f} ms |",
        f"| a file's task as it is sent to another machine | {seen.task / 1e6:.2f} MB, pickled in {1000 * seen.task_time:.1f} ms |",
        "",
        f"Arithmetic from here on, in seconds: {NODE:g} GB/s a machine, the storage as the columns say, plan and digest at their CPU time.",
        "",
        "| machines | GB of the busiest | its files and parts | "
        + " | ".join(f"job array, storage {shared:g} GB/s" for shared in SHARED)
        + f" | Ray, {SHARED[-1]:g} GB/s |",
        "|---:|---:|---:|" + "---:|" * (len(SHARED) + 1),
    ]
    for machines, most in zip(NODES, seen.busiest, strict=True):
        times = [*(model(seen, shared, most, 2) for shared in SHARED), model(seen, SHARED[-1], most, 1)]
        lines.append(f"| {machines} | {most[0] / 1e9:.1f} | {most[1]} | {' | '.join(f'{seconds:.0f}' for seconds in times)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    told = parser.parse_args()
    seen = measure()
    print(asdict(seen))
    table = report(seen)
    print(table)
    if told.write:
        head, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}{table}{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
