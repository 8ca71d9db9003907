"""Coverage-guided fuzzing of all that reads text or files of unknown origin: `python bench/fuzz.py TARGET --seconds 120`, or `all --write`.

One target runs in one process. For every input: only our own errors may come out, with the exit code that the target names, in a text that
a terminal can show; no import, no call of the system, no file written; at most 5 s of processor time (instrumented code is slow) and
200 MB. Where another program reads the same files, what both accept must be the same. What is found is printed, kept in PLACE/findings, and
the run goes on. Needs atheris; only the modules of this package are instrumented.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from fuzz_targets import LONGEST, TARGETS, Target, error_type

HERE = Path(__file__).resolve().parent.parent
PAGE = HERE / "docs" / "reliability.md"
BEGIN, END = "<!-- fuzz -->\n", "<!-- end of fuzz -->"
HEAD = ("target", "seconds", "inputs", "coverage", "features", "inputs kept", "findings")
MODULES = {"sizes": ("cli",), "config": ("checkpoint", "plan"), "stamp": ("checkpoint",), "certificate": ("certificate", "run")}
"""What a target instruments beside the parsers."""
SECONDS, MEGABYTES, LETTERS = 5.0, 200, 20_000


class Watch:
    """Runs inputs and writes down what is wrong with them, each kind of fault once."""

    def __init__(self, name: str, target: Target, findings: Path) -> None:
        from tests.hostile_run import HARMLESS, WRITING

        self.name, self.target, self.findings = name, target, findings
        self.ours, self.on, self.did, self.seen = error_type(), False, list[str](), set[str]()
        harmless = HARMLESS | {"compile", "_thread.start_new_thread", "sys._getframe", "object.__getattr__", "mmap.__new__"}

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.truncate" and isinstance(args[0], int):  # what `Held` does
                return
            if self.on and (event not in harmless or (event == "open" and isinstance(args[2], int) and args[2] & WRITING)):
                self.did.append(f"{event} {args!r}"[:200])

        sys.addaudithook(hook)

    def __call__(self, data: bytes) -> None:
        result, error, told = None, None, ""
        before, begin, self.on = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), True
        try:
            result = self.target.read(data)
        except self.ours as raised:
            error = raised
            told = raised.text()
        except Exception as raised:
            self.on = False
            self.found(data, f"{type(raised).__name__}: {raised} at {_place(raised)}", f"{type(raised).__name__} {_place(raised)}")
            return
        self.on = False
        seconds, grown = time.process_time() - begin, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        code = getattr(error, "exit_code", None)
        if error and code not in self.target.exits:
            self.found(data, f"exit code {code}: {told[:200]}", f"exit code {code} {error.what}")
        if len(told) > LETTERS or not told.replace("\n", "").isprintable():
            self.found(data, f"the text of an error: {told[:200]!r}", f"text {error and error.what}")
        if self.did:
            self.found(data, f"it did {self.did[0]}", self.did[0].partition(" ")[0])
            self.did.clear()
        if seconds > SECONDS or grown > MEGABYTES:
            self.found(data, f"{seconds:.1f} s, {grown:.0f} MB", "too much")
        try:
            wrong = self.target.agree(data, result, error)
        except Exception as raised:
            wrong = f"{type(raised).__name__} where it is compared: {raised} at {_place(raised)}"
        if wrong:
            self.found(data, wrong, wrong.partition(":")[0] if "refuse" in wrong else wrong[:60])

    def found(self, data: bytes, what: str, kind: str) -> None:
        if kind not in self.seen:
            self.seen.add(kind)
            self.findings.mkdir(parents=True, exist_ok=True)
            (self.findings / f"{self.name}-{len(self.seen)}").write_bytes(data)
            print(f"FINDING {self.name}-{len(self.seen)}: {what!r}", flush=True)


def _place(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "triptych" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


# Runs


def fuzz(name: str, seconds: int, place: Path) -> None:
    """Run one target in this process, which ends with it."""
    import unicodedata  # noqa: F401  Python's parser imports it late

    try:
        import atheris
    except ImportError:
        raise SystemExit("bench/fuzz.py needs atheris: pip install atheris") from None

    sys.path[:0] = [str(HERE / "src"), str(HERE)]
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["triptych"]):
        for module in ("formats.folder", "families", "rowmap", *MODULES.get(name, ())):
            __import__(f"triptych.{module}")
    corpus = place / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    work = place / "work" / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    target = TARGETS[name](work)
    watch = Watch(name, target, place / "findings")
    str(watch.ours("\0", found="\ud800\0"))
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
        with contextlib.suppress(Exception):  # fills caches, and imports what is imported late
            target.agree(seed, target.read(seed), None)
    words = place / f"{name}.dict"
    words.write_text("".join('"' + word.replace('"', '\\"') + '"\n' for word in target.words))
    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=30", "-rss_limit_mb=3000", "-print_final_stats=1",
               f"-artifact_prefix={place}/findings-{name}-", "-verbosity=1"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, *([f"-dict={words}"] if target.words else []), str(corpus)], watch)
    atheris.Fuzz()


def run(name: str, seconds: int, place: Path) -> str:
    """One target in a process of its own; its line of the table."""
    command = [sys.executable, str(Path(__file__).resolve()), name, "--seconds", str(seconds), "--place", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    told = done.stdout + done.stderr
    findings = sorted(set(re.findall(r"^FINDING .*", told, re.MULTILINE)))
    last = re.findall(r"^#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)/", told, re.MULTILINE)
    if done.returncode or not last:
        findings.append(f"{name} ended by itself: {told[-600:]}")
    print("\n".join([f"{name}: {last[-1] if last else 'no end'}", *findings]), flush=True)
    inputs, covered, features, kept = last[-1] if last else ("?",) * 4
    return f"| {name} | {seconds} | {inputs} | {covered} | {features} | {kept} | {len(findings)} |"


def write(lines: dict[str, str]) -> None:
    """Put lines into the table of the page; those of other targets stay."""
    page = PAGE.read_text("utf-8")
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    old = {line.split(" ")[1]: line for line in page[begin:end].split("\n") if line.startswith("| ")}
    when = f"{datetime.date.today()}, {platform.system()}, Python {platform.python_version()}, one process at a time.\n\n"
    every = {**old, **lines}
    table = [f"| {' | '.join(HEAD)} |", "|---|" + "---:|" * (len(HEAD) - 1), *(every[name] for name in TARGETS if name in every)]
    PAGE.write_text(page[:begin] + when + "\n".join(table) + "\n" + page[end:], "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=180, help="for each target")
    parser.add_argument("--place", type=Path, default=HERE / ".bench" / "fuzz", help="for inputs that are kept, and findings")
    parser.add_argument("--write", action="store_true", help="run it apart, and put its line into docs/reliability.md")
    told = parser.parse_args()
    if told.target != "all" and not told.write:
        told.place.mkdir(parents=True, exist_ok=True)
        fuzz(told.target, told.seconds, told.place)
        return 0
    clean = True
    for name in TARGETS if told.target == "all" else [told.target]:
        line = run(name, told.seconds, told.place)
        clean = clean and line.endswith("| 0 |")
        if told.write:
            write({name: line})
    return int(not clean)


if __name__ == "__main__":
    sys.exit(main())
