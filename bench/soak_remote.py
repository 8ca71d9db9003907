"""Breaks conversions from a store to a store, then looks at what is left: `python -m bench.soak_remote`.

A relay stands between us and a server on loopback. Every n-th request of one small conversion fails once, or all do from the n-th on;
conversions in processes of their own are killed. After each the output is absent, or complete, or marked, and the same command
completes it; no object and no upload is left beside it. With --write the table goes into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests import files
from tests.remote_relay import Relay, relayed
from tests.remote_servers import ENVIRONMENT, gcs, s3

import triptych as tt
from triptych import remote, remote_out
from triptych.formats import MARKER

from .soak_crash import PAGE, in_child

BEGIN, END = "<!-- remote soak -->\n", "<!-- end of remote soak -->"
HEADS, DIM = 3, 64
SHARDS: list[dict[str, tuple[str, tuple[int, ...]]]] = [
    {"gpt_neox.layers.0.attention.query_key_value.weight": ("BF16", (3 * HEADS * DIM, HEADS * DIM)), "x": ("U8", (1_100_003,))},
    {"gpt_neox.layers.0.attention.query_key_value.bias": ("BF16", (3 * HEADS * DIM,))},
]
CONFIG = {"model_type": "gpt_neox", "hidden_size": HEADS * DIM, "num_attention_heads": HEADS}
ONCE = {"broken before": "reset", "answer lost": "lost", "answer cut": "cut", "503": "503"}
LASTING = {"503 from then on": "503", "403 from then on": "403"}
COLUMNS = ("runs", "requests", "complete", "absent", "by re-run", "leftovers", "wrong")
HEAD = ("kind", "runs", "requests of a run", "complete at once", "output absent", "completed by re-run", "leftovers", "wrong")


class Job(NamedTuple):
    """The conversion of `<url>/a` to `<url>/b`; what lies there, and how many uploads are open; what a clean run leaves; errors."""

    url: str
    relay: Relay
    look: Callable[[], dict[str, bytes]]
    uploads: Callable[[], int]
    wipe: Callable[[], None]
    expected: dict[str, bytes]
    told: list[str]

    def run(self) -> str:
        """done, or the kind of our error; any other one is the end of the campaign."""
        try:
            tt.convert(f"{self.url}/a", f"{self.url}/b", "split", workers=1)
        except tt.TriptychError as error:
            self.told.append(str(error))
            return type(error).__name__
        return "done"


def judge(job: Job, said: str | None, found: Counter[str]) -> None:
    """Count what a broken run left; where it is not complete, the same command must complete it. `said`: None of one that was killed."""
    job.relay.set(lambda number, method, path: None)
    there = job.look()
    left = "complete" if there == job.expected else "absent" if not there else "by re-run"
    marked = {name: data for name, data in there.items() if name != MARKER}
    as_said = {"done": left == "complete", None: True}.get(said, left != "complete")
    sound = left != "by re-run" or (MARKER in there and marked.items() <= job.expected.items())
    after = "done" if left == "complete" else job.run()
    if not (as_said and sound and after == "done" and job.look() == job.expected):
        found["wrong"] += 1
        print(f"said {said}, left {left}: {sorted(there)}; then {after}: {sorted(job.look())}", job.told[-1:], file=sys.stderr)
    else:
        found[left] += 1
    found["leftovers"] += job.uploads() > 0
    found["runs"] += 1
    job.wipe()


def faults(job: Job, kind: str, lasting: bool) -> Counter[str]:
    """One run for each request of a clean one, which fails at that request."""
    found: Counter[str] = Counter()
    for n in range(1, 10_000):
        job.relay.set(lambda number, method, path, n=n: kind if number == n or (lasting and number > n) else None)  # type: ignore[misc]
        said = job.run()
        if job.relay.number < n:
            job.wipe()
            break
        found["requests"] = max(found["requests"], job.relay.number)
        found["wrong"] += not lasting and said != "done"  # one fault is overcome
        judge(job, said, found)
    return found


def kills(job: Job, number: int, chance: random.Random) -> Counter[str]:
    """Runs that are killed at some time between begin and end."""
    found: Counter[str] = Counter()
    job.relay.set(lambda number, method, path: None)
    begin = time.perf_counter()
    code = os.waitpid(in_child(lambda: int(job.run() != "done")), 0)[1]
    longest = time.perf_counter() - begin
    assert code == 0 and job.look() == job.expected
    found["requests"] = job.relay.number
    job.wipe()
    for _ in range(number):
        job.relay.set(lambda number, method, path: None)
        pid = in_child(lambda: int(job.run() != "done"))
        time.sleep(chance.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        judge(job, None, found)
    return found


@contextmanager
def stores(source: dict[str, bytes], expected: dict[str, bytes]) -> Iterator[dict[str, Job]]:
    """S3 and Google Cloud Storage, each behind a relay."""
    os.environ |= ENVIRONMENT
    with s3() as (url, bucket), gcs() as (other, store), relayed(url) as (near, relay), relayed(other) as (far, second):
        os.environ |= {"AWS_ENDPOINT_URL": near, "STORAGE_EMULATOR_HOST": far}
        bucket.put("a/", source)
        for name, data in source.items():
            remote.put(f"gs://bucket/a/{name}", data, "")

        def wipe_s3() -> None:
            for name in bucket.names("b/"):
                bucket.client.delete_object(Bucket="bucket", Key=name)

        def wipe_gs() -> None:
            for name in store.names("b/"):
                store.storage.delete_file("bucket", name)

        yield {
            "S3": Job("s3://bucket", relay, lambda: bucket.snapshot("b/"), lambda: len(bucket.uploads()), wipe_s3, expected, []),
            "Google": Job("gs://bucket", second, lambda: store.snapshot("b/"), lambda: 0, wipe_gs, expected, []),
        }


def campaign(root: Path, number: int, only: str) -> Iterator[tuple[str, Counter[str]]]:
    files.checkpoint(root / "a", SHARDS, CONFIG)
    tt.convert(root / "a", root / "b", "split")
    remote.WAITS, remote.BLOCK, remote_out.BEAT, remote_out.PATIENCE = (0.0,) * 4, 1 << 18, 0.1, 0.4
    from moto.s3 import models

    models.S3_UPLOAD_PART_MIN_SIZE = 1
    with stores(files.snapshot(root / "a"), files.snapshot(root / "b")) as every:
        for name, job in every.items():
            for title, kind in {**ONCE, **LASTING}.items():
                if only in f"{title}, {name}":
                    yield f"{title}, {name}", faults(job, kind, title in LASTING)
            if only in f"kill -9, {name}":
                yield f"kill -9, {name}", kills(job, number, random.Random(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20, help="conversions to kill, for each store")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    told = parser.parse_args()
    lines = [f"| {' | '.join(HEAD)} |", "|---|" + "---:|" * len(COLUMNS)]
    total: Counter[str] = Counter()
    print("\n".join(lines))
    with tempfile.TemporaryDirectory(prefix="triptych-soak-") as root:
        for name, found in campaign(Path(root), told.kills, told.only):
            total += found
            lines.append(f"| {name} | {' | '.join(str(found[column]) for column in COLUMNS)} |")
            print(lines[-1], flush=True)
    total["requests"] = 0
    lines.append(f"| all | {' | '.join(str(total[column] or ('' if column == 'requests' else 0)) for column in COLUMNS)} |")
    print(lines[-1])
    if told.write:
        day = f"{datetime.date.today().isoformat()}, {platform.system()}, Python {platform.python_version()}."
        head, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}{day}\n\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}", "utf-8")
    sys.exit(1 if total["wrong"] or total["leftovers"] else 0)


if __name__ == "__main__":
    main()
