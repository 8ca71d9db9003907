"""Kills small conversions at random points, and fails every n-th call of one, then looks at what is left: `python bench/soak_crash.py`.

After each: the output is absent, or old, or what a clean run gives; running it again gives what a clean run gives and leaves nothing
else; the input is untouched. With --write the table goes into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent.parent
PAGE = HERE / "docs" / "reliability.md"
BEGIN, END = "<!-- soak -->\n", "<!-- end of soak -->"
HEADS, DIM, COLUMNS, LAYERS, SHARDS = 6, 16, 288, 6, 2
TO = "(q|k|v) h d"
WRITES = ("pwrite", "posix_fallocate", "ftruncate", "mkdir", "rename", "fsync")
CALLS = (*WRITES, "open", "pread", "preadv", "unlink", "rmdir")
FAULTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ENOSPC, lasting": (errno.ENOSPC, WRITES),
    "EIO, once": (errno.EIO, CALLS),
    "EMFILE, once": (errno.EMFILE, ("open",)),
    "short write": (0, ("pwrite",)),
    "short read": (0, ("pread", "preadv")),
}
DONE, REFUSED, CRASHED, NOT_REACHED = 0, 1, 2, 3
COLUMNS_OF_TABLE = ("runs", "absent", "old", "complete", "by re-run", "leftovers", "wrong")
HEAD = ("kind", "runs", "output absent", "old output kept", "complete at once", "completed by re-run", "leftovers", "wrong")


class Job(NamedTuple):
    """One conversion: what it reads, where it writes, in how many shares; what a clean run leaves there, and what was in the input."""

    source: Path
    out: Path
    more: dict[str, Any]
    shares: int
    expected: dict[str, bytes]
    before: dict[str, bytes]

    def run(self) -> None:
        import triptych as tt
        from triptych import portions

        portions.LEAST = 0  # small files are divided too
        for number in range(self.shares):
            tt.convert(self.source, self.out, TO, share=(number + 1, self.shares), **self.more)
        tt.convert(self.source, self.out, TO, finish=self.shares > 0, **self.more)


def checkpoint(folder: Path, shards: int = SHARDS) -> None:
    """Shards of a few layers, random bytes, an index, a config and a file that is none of these."""
    import json

    from triptych.formats import header_bytes, index_bytes

    folder.mkdir()
    weight_map, total = {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        entries, at = [], 0
        for layer in range(shard * LAYERS // shards, (shard + 1) * LAYERS // shards):
            home = f"gpt_neox.layers.{layer}"
            for name, shape in ((f"{home}.attention.query_key_value.weight", (3 * HEADS * DIM, COLUMNS)),
                                (f"{home}.attention.query_key_value.bias", (3 * HEADS * DIM,)),
                                (f"{home}.mlp.dense_h_to_4h.weight", (4 * COLUMNS, COLUMNS))):  # fmt: skip
                size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
                entries.append((name, "BF16", shape, at, at + size))
                weight_map[name] = file
                at += size
        (folder / file).write_bytes(header_bytes(entries, {"format": "pt"}) + random.Random(shard).randbytes(at))
        total += at
    if shards > 1:
        (folder / "model.safetensors.index.json").write_bytes(index_bytes(weight_map, total, {}))
    config = {"model_type": "gpt_neox", "hidden_size": HEADS * DIM, "num_attention_heads": HEADS}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(random.Random(9).randbytes(70_001))


def snapshot(place: Path) -> dict[str, bytes]:
    """Everything below a folder, or in the folder of a file: names with contents; folders count as names too."""
    return {path.relative_to(place).as_posix(): path.read_bytes() if path.is_file() else b"" for path in place.rglob("*")}


def in_child(work: Callable[[], int]) -> int:
    """Run in a forked process, without its talk; the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = CRASHED
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = work()
    finally:
        os._exit(code)


def attempt(job: Job) -> int:
    from triptych.errors import TriptychError

    try:
        job.run()
    except TriptychError:
        return REFUSED
    return DONE


def killed(job: Job, after: float) -> None:
    """Start the conversion and kill it after so many seconds."""
    pid = in_child(lambda: attempt(job))
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def faulty(job: Job, error: int, names: tuple[str, ...], n: int, lasting: bool) -> int:
    """The conversion with its n-th call of these failing, or with error 0 doing half of its work; DONE, REFUSED, CRASHED, NOT_REACHED."""

    def work() -> int:
        count = 0

        def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal count
                count += 1
                if error and (count == n or (lasting and count > n)):
                    raise OSError(error, os.strerror(error))
                if count == n:
                    if name == "pwrite":
                        return real(args[0], args[1][: max(1, len(args[1]) // 2)], args[2])
                    if name == "pread":
                        return real(args[0], max(1, args[1] // 2), args[2])
                    return real(args[0], [part[: max(1, len(part) // 2)] for part in args[1][:1]], args[2])
                return real(*args, **more)

            return call

        for name in names:
            setattr(os, name, wrapped(getattr(os, name), name))
        code = attempt(job)
        return code if count >= n else NOT_REACHED

    return os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])


def state(job: Job, place: Path) -> str:
    """absent, complete, begun (to be run again), or wrong: a file that bears its last name and is not whole."""
    there = snapshot(place)
    if not job.out.exists() or (job.out.is_dir() and not any(job.out.iterdir())):
        return "begun" if any(name != job.out.name for name in there) else "absent"
    if there == job.expected:
        return "complete"
    final = {name: content for name, content in there.items() if ".triptych-" not in name}
    return "begun" if final != there and final.items() <= job.expected.items() else "wrong"


def judge(job: Job, place: Path, found: Counter[str]) -> None:
    """What a broken run left: counted; then run again, which must give what a clean run gives."""
    left = state(job, place)
    found["runs"] += 1
    if left in ("absent", "begun"):
        try:
            job.run()
        except Exception as error:
            print(f"the re-run failed: {error}", file=sys.stderr)
            left = "wrong"
    after = snapshot(place)
    found["leftovers"] += bool(after.keys() - job.expected.keys())
    if left == "wrong" or after != job.expected or _input(job) != job.before:
        found["wrong"] += 1
    else:
        found["by re-run" if left == "begun" else left] += 1


def _input(job: Job) -> dict[str, bytes]:
    return snapshot(job.source if job.source.is_dir() else job.source.parent)


def fresh(place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


def jobs(root: Path) -> Iterator[tuple[str, Job]]:
    """The conversions, with what a clean run of each leaves."""
    checkpoint(root / "a")
    checkpoint(root / "s", 1)
    by_hand = {"layouts": {"*query_key_value*": "h (q|k|v) d"}, "h": HEADS}
    one = root / "a" / "model-00001-of-00002.safetensors"
    for name, source, out, more, shares in (
        ("folder, 2 workers", root / "a", "b", {"workers": 2}, 0),
        ("folder, 1 worker", root / "a", "b", {"workers": 1}, 0),
        ("one file", one, "b.safetensors", {"workers": 1, **by_hand}, 0),
        ("one file divided, 2 workers", one, "b.safetensors", {"workers": 2, **by_hand}, 0),
        ("folder of one file divided, 2 workers", root / "s", "b", {"workers": 2}, 0),
        ("folder of one file divided, 3 shares", root / "s", "b", {"workers": 1}, 3),
    ):
        job = Job(source, fresh(root / "place") / out, more, shares, {}, {})
        job.run()
        yield name, job._replace(expected=snapshot(root / "place"), before=_input(job))


def soak(root: Path, kills: int, seconds: float, only: str = "") -> Iterator[tuple[str, Counter[str]]]:
    """All campaigns, one after the other; those of the kills end early when their time is over."""
    place, chance = root / "place", random.Random(0)
    every = [(name, job) for name, job in jobs(root) if only in name]
    for number, (name, job) in enumerate(every):
        found: Counter[str] = Counter()
        times = []
        for _ in range(5):
            fresh(place)
            begin = time.perf_counter()
            os.waitpid(in_child(lambda job=job: attempt(job)), 0)  # type: ignore[misc]
            times.append(time.perf_counter() - begin)
        longest, end = sorted(times)[2], time.monotonic() + seconds / len(every)
        share = kills * (number + 1) // len(every) - kills * number // len(every)
        while found["runs"] < share and time.monotonic() < end:
            fresh(place)
            killed(job, chance.uniform(0, longest))
            if chance.random() < 0.25 and state(job, place) == "begun":
                killed(job, chance.uniform(0, longest))  # the run that goes on is killed too
                found["again"] += 1
            judge(job, place, found)
        yield f"kill -9, {name}", found
    name, job = every[0]
    found = Counter()
    for _ in range(max(1, kills // 50) if job.out.suffix == "" else 0):
        fresh(place)
        job.out.mkdir()
        (job.out / "model.safetensors").write_bytes(b"old")
        old = snapshot(place)
        killed(job, chance.uniform(0, 0.05))
        found["runs"] += 1
        found["old" if snapshot(place) == old and _input(job) == job.before else "wrong"] += 1
    yield "kill -9, over an old output", found
    for name, job in every:
        for kind, (error, calls) in FAULTS.items():
            found = Counter()
            for n in range(1, 100_000):
                fresh(place)
                code = faulty(job, error, calls, n, "lasting" in kind)
                if code == NOT_REACHED:
                    break
                left = state(job, place)
                as_said = left != "wrong" if job.shares and code == REFUSED else (code == REFUSED) == (left == "absent")
                if code == CRASHED or not as_said:  # what shares did is left for the others and for the one who finishes
                    found["runs"] += 1
                    found["wrong"] += 1
                    print(f"{kind}, {name}, call {n}: exit {code}, {state(job, place)}, {sorted(snapshot(place))}", file=sys.stderr)
                    continue
                judge(job, place, found)
            yield f"{kind}, {name}", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=1020, help="conversions to kill")
    parser.add_argument("--seconds", type=float, default=3600, help="no kills after that long")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    told = parser.parse_args()
    sys.path.insert(0, str(HERE / "src"))
    lines = [f"| {' | '.join(HEAD)} |", "|---|" + "---:|" * len(COLUMNS_OF_TABLE)]
    total: Counter[str] = Counter()
    print("\n".join(lines))
    with tempfile.TemporaryDirectory(prefix="triptych-soak-") as root:
        for name, found in soak(Path(root), told.kills, told.seconds, told.only):
            total += found
            lines.append(f"| {name} | {' | '.join(str(found[column]) for column in COLUMNS_OF_TABLE)} |")
            print(lines[-1], flush=True)
    lines.append(f"| all | {' | '.join(str(total[column]) for column in COLUMNS_OF_TABLE)} |")
    print(lines[-1])
    if told.write:
        today, system = datetime.date.today().isoformat(), f"{platform.system()}, Python {platform.python_version()}"
        again = f"In {total['again']} of the kills the run that went on was killed as well."
        head, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        table = f"{today}, {system}. {again}\n\n" + "\n".join(lines) + "\n"
        PAGE.write_text(f"{head}{BEGIN}{table}{END}{rest.partition(END)[2]}", "utf-8")
    sys.exit(1 if total["wrong"] or total["leftovers"] else 0)


if __name__ == "__main__":
    main()
