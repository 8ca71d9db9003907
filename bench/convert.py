"""Converting a checkpoint against copying it: `cp` and ours with one and two workers, every output synced to the disk.

    python bench/convert.py [--layers N] [--rounds N] [--to LAYOUT] [--no-sync]

Input: GPT-NeoX-shaped, bf16, in three shards under .bench/, made on the first run. Every round runs all ways in a new order; a ratio is one
way's time over that of `cp` in the same round, because absolute times drift. What is printed is the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
BENCH = HERE / ".bench"
HIDDEN, HEADS, INNER, WORDS, SHARDS = 2048, 16, 8192, 50432, 3
CHILD = """
import json, os, sys, time
import triptych as tt
source, out, to, workers, sync = sys.argv[1:]
if sync == "no":
    os.fsync = lambda fd: None
tt.plan(source, to)
begin = time.perf_counter()
tt.convert(source, out, to, workers=int(workers))
seconds = time.perf_counter() - begin
print(json.dumps([seconds, int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])]))
"""


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "gpt_neox.embed_in.weight", (WORDS, HIDDEN)
    for layer in range(layers):
        home = f"gpt_neox.layers.{layer}"
        for name, rows, columns in (("attention.query_key_value", 3 * HIDDEN, HIDDEN), ("attention.dense", HIDDEN, HIDDEN),
                                    ("mlp.dense_h_to_4h", INNER, HIDDEN), ("mlp.dense_4h_to_h", HIDDEN, INNER)):  # fmt: skip
            yield f"{home}.{name}.weight", (rows, columns)
            yield f"{home}.{name}.bias", (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{home}.{name}.weight", (HIDDEN,)
            yield f"{home}.{name}.bias", (HIDDEN,)
    yield "gpt_neox.final_layer_norm.weight", (HIDDEN,)
    yield "gpt_neox.final_layer_norm.bias", (HIDDEN,)
    yield "embed_out.weight", (WORDS, HIDDEN)


def checkpoint(layers: int) -> Path:
    """The input, made once."""
    from triptych.formats import header_bytes, index_bytes, nbytes

    folder = BENCH / f"neox-{layers}"
    if (folder / "config.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    every = [(name, shape, nbytes("BF16", shape) or 0) for name, shape in tensors(layers)]
    total, weight_map, done = sum(size for _, _, size in every), {}, 0
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[] for _ in range(SHARDS)]
    for name, shape, size in every:
        shard = min(SHARDS - 1, done * SHARDS // total)
        shards[shard].append((name, shape, size))
        done += size
    noise = random.Random(0).randbytes(1 << 22)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        at, entries = 0, []
        for name, shape, size in shard:
            entries.append((name, "BF16", shape, at, at + size))
            weight_map[name] = file
            at += size
        with (folder / file).open("wb") as out:
            out.write(header_bytes(entries, {"format": "pt"}))
            for start in range(0, at, len(noise)):
                out.write(noise[: min(len(noise), at - start)])
    (folder / "model.safetensors.index.json").write_bytes(index_bytes(weight_map, total, {}))
    config = {"model_type": "gpt_neox", "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def copy(source: Path, out: Path, sync: bool) -> tuple[float, float]:
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    if sync:
        for path in [*out.iterdir(), out]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    return time.perf_counter() - begin, 0


def ours(source: Path, out: Path, to: str, workers: int, sync: bool) -> tuple[float, float]:
    command = [sys.executable, "-c", CHILD, str(source), str(out), to, str(workers), "yes" if sync else "no"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(HERE / "src")})
    seconds, rss = json.loads(done.stdout)
    return seconds, rss / 1024


def settle(size: int) -> None:
    """Touch and free a block of memory, so that every run finds free pages and not those that the host must give back first."""
    with mmap.mmap(-1, size) as block:
        for at in range(0, size, 4096):
            block[at] = 1
    os.sync()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--to", default="(q|k|v) h d")
    parser.add_argument("--no-sync", action="store_true")
    told = parser.parse_args()
    sys.path.insert(0, str(HERE / "src"))
    source, out, sync = checkpoint(told.layers), BENCH / "out", not told.no_sync
    size = sum(path.stat().st_size for path in source.iterdir())
    ways = {
        "cp": lambda: copy(source, out, sync),
        "triptych, 1 worker": lambda: ours(source, out, told.to, 1, sync),
        "triptych, 2 workers": lambda: ours(source, out, told.to, 2, sync),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float] = {}
    for number in range(told.rounds + 1):
        for name in random.Random(number).sample(list(ways), len(ways)):
            shutil.rmtree(out, ignore_errors=True)
            settle(size)
            seconds, memory[name] = ways[name]()
            if number:  # the first round warms the page cache
                times[name].append(seconds)
    shutil.rmtree(out, ignore_errors=True)
    print(f"{size / 1e9:.2f} GB, {SHARDS} shards, to {told.to}, {'synced' if sync else 'not synced'}, {told.rounds} rounds")
    print(f"{'':<22}{'seconds':>9}{'GB/s':>8}{'/ cp':>8}{'spread':>16}{'MB':>6}")
    for name, found in times.items():
        ratios = [mine / cp for mine, cp in zip(found, times["cp"], strict=True)]
        seconds = statistics.median(found)
        line = f"{name:<22}{seconds:>9.2f}{size / seconds / 1e9:>8.2f}{statistics.median(ratios):>8.2f}"
        print(line + (f"{min(ratios):>9.2f} - {max(ratios):.2f}{memory[name]:>6.0f}" if memory[name] else ""))


if __name__ == "__main__":
    main()
