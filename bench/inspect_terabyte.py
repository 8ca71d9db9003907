"""Inspects and plans a checkpoint of 1 TB, 200 shards of 1000 tensors, beside json.loads of the same headers: user CPU, wall, memory.

The files are sparse: headers are real, tensors are holes. `python bench/inspect_terabyte.py [--rounds N]`
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
SHARDS, LAYERS, EXPERTS = 200, 1000, 192
HEADS, HIDDEN, INNER = 16, 1024, 2624
INDEX = "model.safetensors.index.json"
PARSE = """
import gc, json, os, sys
{gc}
kept = []
for entry in sorted(os.scandir(sys.argv[1]), key=lambda entry: entry.name):
    with open(entry.path, "rb") as file:
        kept.append(json.loads(file.read(int.from_bytes(file.read(8), "little")) if entry.name.endswith("safetensors") else file.read()))
os._exit(0)
"""


class Seen(NamedTuple):
    """What a child process took: seconds of user CPU, seconds of wall time, peak resident MB."""

    user: float
    wall: float
    rss: float


def tensors(layer: int) -> dict[str, tuple[int, ...]]:
    """The 200 tensors of a layer: attention, two norms, a mixture of experts."""
    home = f"gpt_neox.layers.{layer}"
    out: dict[str, tuple[int, ...]] = {
        f"{home}.attention.query_key_value.weight": (3 * HIDDEN, HIDDEN),
        f"{home}.attention.query_key_value.bias": (3 * HIDDEN,),
        f"{home}.attention.dense.weight": (HIDDEN, HIDDEN),
        f"{home}.attention.dense.bias": (HIDDEN,),
        f"{home}.input_layernorm.weight": (HIDDEN,),
        f"{home}.input_layernorm.bias": (HIDDEN,),
        f"{home}.post_attention_layernorm.weight": (HIDDEN,),
        f"{home}.post_attention_layernorm.bias": (HIDDEN,),
    }
    for expert in range(EXPERTS):
        out[f"{home}.mlp.experts.{expert // 2}.{'up_proj' if expert % 2 else 'down_proj'}.weight"] = (
            (INNER, HIDDEN) if expert % 2 else (HIDDEN, INNER)
        )
    return out


def checkpoint(folder: Path) -> Path:
    """The folder with its files, made once."""
    from triptych.formats import header_bytes, index_bytes, nbytes

    if (folder / "config.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total, each = 0, LAYERS // SHARDS
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        entries, at = [], 0
        for layer in range(number * each, (number + 1) * each):
            for name, shape in tensors(layer).items():
                size = nbytes("BF16", shape) or 0
                entries.append((name, "BF16", shape, at, at + size))
                weight_map[name] = file
                at += size
        header = header_bytes(entries, {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + at)
        total += at
    (folder / INDEX).write_bytes(index_bytes(weight_map, total, {}))
    config = {"model_type": "gpt_neox", "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def child(code: str, *arguments: str) -> Seen:
    """Run Python code in a process of its own."""
    begin = time.perf_counter()
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execve(sys.executable, [sys.executable, "-c", code, *arguments], {**os.environ, "PYTHONPATH": str(HERE / "src")})
    _, status, used = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"a run failed: {' '.join(arguments)}")
    return Seen(used.ru_utime, time.perf_counter() - begin, used.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args()
    sys.path.insert(0, str(HERE / "src"))
    folder = str(checkpoint(HERE / ".bench" / "terabyte"))
    command = "from triptych.cli import main; main()"
    ways = {
        "json.loads, collector off": (PARSE.format(gc="gc.disable()"), folder),
        "json.loads": (PARSE.format(gc=""), folder),
        "triptych inspect": (command, "inspect", folder),
        "triptych plan": (command, "plan", folder, "--to", "(q|k|v) h d"),
    }
    seen: dict[str, list[Seen]] = {name: [] for name in ways}
    for _ in range(told.rounds):
        for name, way in ways.items():
            seen[name].append(child(*way))
    headers = sum(path.stat().st_blocks for path in Path(folder).iterdir()) * 512
    logical = sum(path.stat().st_size for path in Path(folder).iterdir())
    print(f"{logical / 1e12:.2f} TB, {SHARDS} shards, {SHARDS * 1000} tensors, {headers / 1e6:.0f} MB of headers and index; "
          f"medians of {told.rounds} rounds, spread in brackets")  # fmt: skip
    print(f"{'':<28}{'user s':>8}{'':18}{'wall s':>8}{'MB':>6}{'/ json':>8}")
    first = next(iter(seen.values()))
    for name, runs in seen.items():
        user, wall, rss = (statistics.median(column) for column in zip(*runs, strict=True))
        ratio = statistics.median(run.user / base.user for run, base in zip(runs, first, strict=True))
        spread = f"[{min(run.user for run in runs):.2f} - {max(run.user for run in runs):.2f}]"
        print(f"{name:<28}{user:>8.2f}  {spread:<16}{wall:>8.2f}{rss:>6.0f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
