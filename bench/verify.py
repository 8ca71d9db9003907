"""Proving and comparing checkpoints against `cmp` of the same bytes: verify, the certificate, its check and diff.

    python bench/verify.py [--layers N] [--rounds N]

Input: GPT-NeoX-shaped, bf16, in three shards under .bench/ (as bench/convert.py makes it), and the same converted to `(q|k|v) h d`; with 24
layers 2.8 GB. `cmp` reads the input's shards against a copy of them, byte by byte. Every round runs all ways in a new order; a ratio is one
way's time over that of `cmp` in the same round, because absolute times drift. What is printed is the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE / "src"), str(HERE / "bench")]

from convert import BENCH, SHARDS, checkpoint  # noqa: E402

TO = "(q|k|v) h d"
CHILD = """
import json, sys, time
import triptych as tt
from triptych import certificate, verify
code = sys.argv[1]
begin = time.perf_counter()
eval(code)
seconds = time.perf_counter() - begin
print(json.dumps([seconds, int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])]))
"""


def cmp(source: Path, copy: Path) -> tuple[float, float]:
    begin = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        subprocess.run(["cmp", str(path), str(copy / path.name)], check=True)
    return time.perf_counter() - begin, 0


def ours(code: str) -> tuple[float, float]:
    command = [sys.executable, "-c", CHILD, code]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(HERE / "src")})
    seconds, kilobytes = json.loads(done.stdout)
    return seconds, kilobytes / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args()
    import triptych as tt

    source, copy, out, cert = checkpoint(told.layers), BENCH / "same", BENCH / "moved", BENCH / "moved.json"
    for folder in (copy, out):
        shutil.rmtree(folder, ignore_errors=True)
    cert.unlink(missing_ok=True)
    shutil.copytree(source, copy)
    tt.convert(source, out, TO)
    tt.certify(source, out).write(cert)
    size = sum(path.stat().st_size for path in source.iterdir())
    ways = {
        "cmp": lambda: cmp(source, copy),
        "verify": lambda: ours(f"tt.verify({str(source)!r}, {str(out)!r})"),
        "verify and certificate": lambda: ours(f"tt.certify({str(source)!r}, {str(out)!r})"),
        "check of the certificate": lambda: ours(f"tt.check_certificate({str(cert)!r}, {str(out)!r})"),
        "diff, equal": lambda: ours(f"tt.diff({str(source)!r}, {str(copy)!r})"),
        "diff, another order": lambda: ours(f"tt.diff({str(source)!r}, {str(out)!r})"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float] = {}
    for number in range(told.rounds + 1):
        for name in random.Random(number).sample(list(ways), len(ways)):
            seconds, memory[name] = ways[name]()
            if number:  # the first round warms the page cache
                times[name].append(seconds)
    for folder in (copy, out):
        shutil.rmtree(folder)
    cert.unlink()
    print(f"{size / 1e9:.2f} GB, {SHARDS} shards, h (q|k|v) d against {TO}, {told.rounds} rounds")
    print(f"{'':<26}{'seconds':>9}{'GB/s':>8}{'/ cmp':>8}{'spread':>16}{'MB':>6}")
    for name, found in times.items():
        ratios = [mine / other for mine, other in zip(found, times["cmp"], strict=True)]
        seconds = statistics.median(found)
        line = f"{name:<26}{seconds:>9.2f}{size / seconds / 1e9:>8.2f}{statistics.median(ratios):>8.2f}"
        print(line + (f"{min(ratios):>9.2f} - {max(ratios):.2f}{memory[name]:>6.0f}" if memory[name] else ""))


if __name__ == "__main__":
    main()
