"""Carries out a sharding: what several ranks hold is compared first, then the plan is run as any other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MismatchError, PlanError
from .mover import WINDOW, Tick, read_into
from .output import output_of
from .pieces import in_bytes
from .remote_run import reading
from .run import WORKERS, run
from .shard_plan import Sharding, Twin, merge_plan, shard_plan, tensors_shared
from .steps import Feed, starts


@dataclass(frozen=True)
class Resharded:
    """What a run did. `kept`: files that an earlier, killed run had finished. `share`: (number, of how many) when it did only one."""

    made: Sharding
    kept: tuple[str, ...]
    size: int
    seconds: float
    share: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        plan = self.made.plan
        return {"version": 1, "path": plan.path, "out": plan.out, "target": plan.target, "digest": plan.digest,
                "tensors": len(self.made.wholes), "compared": self.made.compared, "files": [file.name for file in plan.files],
                "kept": list(self.kept), "bytes": self.size, "seconds": round(self.seconds, 3), "share": self.share,
                "notes": list(plan.notes)}  # fmt: skip

    def __str__(self) -> str:
        plan = self.made.plan
        rate = f"{in_bytes(round(self.size / max(self.seconds, 1e-6)))}/s"
        kept = f", {len(self.kept)} kept from an earlier run" if self.kept else ""
        equal = f"; {tensors_shared(self.made.compared)} equal" if self.made.twins else ""
        if self.share:
            return f"{plan.out}: share {self.share[0]} of {self.share[1]}: {in_bytes(self.size)}{kept}; --finish when all shares are done"
        return (
            f"{plan.out}: {len(self.made.wholes)} tensors to {plan.target}{equal}; "
            f"{in_bytes(self.size)} in {len(plan.files)} file{'s' * (len(plan.files) != 1)}{kept}, {self.seconds:.2f} s, {rate}"
        )


def shard(
    path: str | Path,
    out: str | Path,
    tp: int,
    *,
    kv: str | None = None,
    pad_vocab_to: int | None = None,
    layouts: Mapping[str, str] | None = None,
    rules: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    workers: int = WORKERS,
    progress: Tick | None = None,
    **sizes: int,
) -> Resharded:
    """Write one folder per rank below `out`, each with the tensors that a rank of `tp` holds. The input is only read.

    Args: as for `shard_plan` and `convert`.
    Raises what they raise, and MismatchError when ranks that are divided anew hold different bytes of one head, or of one tensor.
    """
    made = shard_plan(path, tp, out, kv=kv, pad_vocab_to=pad_vocab_to, layouts=layouts, rules=rules, records=records, **sizes)
    return carry_out(made, workers=workers, progress=progress)


def merge(
    path: str | Path,
    out: str | Path,
    *,
    tp: int | None = None,
    kv: str | None = None,
    pad_vocab_to: int | None = None,
    layouts: Mapping[str, str] | None = None,
    rules: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    workers: int = WORKERS,
    progress: Tick | None = None,
    **sizes: int,
) -> Resharded:
    """Join the ranks below `path` into one checkpoint. Arguments as for `merge_plan`, errors as for `shard`."""
    made = merge_plan(path, out, tp=tp, kv=kv, pad_vocab_to=pad_vocab_to, layouts=layouts, rules=rules, records=records, **sizes)
    return carry_out(made, workers=workers, progress=progress)


def carry_out(made: Sharding, **ran: Any) -> Resharded:
    """Compare what must be equal, then run the plan; `ran` is all that `run` takes beside it."""
    if made.plan.out is None:
        raise PlanError("a plan without an output cannot be run", where=made.plan.path)
    begin = time.monotonic()
    compare(made)
    done = run(made.plan, **ran)
    return Resharded(made, done.kept, done.size, time.monotonic() - begin, done.share)


def compare(made: Sharding) -> None:
    """That ranks which hold the same heads, or the same tensor, hold the same bytes. Raises MismatchError at the first that differ."""
    one, two = memoryview(bytearray(WINDOW)), memoryview(bytearray(WINDOW))
    asked = {feed.file for twin in made.twins for feed in (twin.first, twin.second)}
    states = tuple(source for source in made.plan.sources if source.name in asked)
    with reading(output_of(made.plan).source, states) as given:
        for twin in made.twins:
            given.fetch([(feed.file, feed.start, feed.start + feed.size) for feed in (twin.first, twin.second)])
            _compare(twin, given.fds, one, two)


def _compare(twin: Twin, fds: Mapping[str, int], one: memoryview, two: memoryview) -> None:
    for n in twin.nests:
        for out, into in zip(starts(n.out, n.dims, 1).tolist(), starts(n.into, n.dims, 2).tolist(), strict=True):
            for skip in range(0, n.width, WINDOW):
                size = min(WINDOW, n.width - skip)
                mine = _bytes(twin.first, into + skip, fds, one[:size])
                copy = _bytes(twin.second, out + skip, fds, two[:size])
                if np.array_equal(mine, copy):
                    continue
                at = int(np.flatnonzero(mine != copy)[0])
                raise MismatchError("two ranks hold different copies of the same rows", tensor=twin.tensor,
                                    where=f"byte {into + skip + at} of {twin.first.file}, byte {out + skip + at} of {twin.second.file}",
                                    expected=f"0x{mine[at]:02x}", found=f"0x{copy[at]:02x}",
                                    try_="they were trained or written apart: take the ranks of one moment")  # fmt: skip


def _bytes(feed: Feed, at: int, fds: Mapping[str, int], part: memoryview) -> np.ndarray[Any, np.dtype[np.uint8]]:
    read_into(fds[feed.file], [part], feed.start + at, len(part), feed.file)
    return np.frombuffer(part, np.uint8)
