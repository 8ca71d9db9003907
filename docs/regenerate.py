"""Runs every command of the ```console blocks and every `>>>` line in README.md and docs/*.md, and writes its real output back.

    python docs/regenerate.py [PAGE ...]         rewrite these pages, or all
    python docs/regenerate.py --check [PAGE ...] exit 1 and show the difference if a page is out of date

A block marked ```console norun is left alone. Commands run in the project's folder with this interpreter's commands first on the path.
An output of `>>>` stays as it stands where it differs in white space and `...` alone.
"""

from __future__ import annotations

import difflib
import doctest
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^ *```.*$", re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)


def output(command: str) -> str:
    """Stdout of a command, then `exit code N` when it is not 0."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    text = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
    return text + (f"exit code {done.returncode}\n" if done.returncode else "")


def fresh(block: str) -> str:
    """The block with the output of each of its `$ command` lines renewed."""
    return "".join(f"$ {line[2:]}\n{output(line[2:])}" for line in block.splitlines() if line.startswith("$ "))


class Answers(doctest.DocTestRunner):
    """Runs the `>>>` lines of a page and keeps what they print where that is not what the page says."""

    def __init__(self) -> None:
        super().__init__(verbose=False, optionflags=FLAGS)
        self.found: list[tuple[doctest.Example, str]] = []

    def report_failure(self, out: object, test: doctest.DocTest, example: doctest.Example, got: str) -> None:
        self.found.append((example, got))


def answered(page: str) -> str:
    """The page with the outputs of its `>>>` lines renewed. Raises RuntimeError for an error that the page does not show."""
    test = doctest.DocTestParser().get_doctest(FENCE.sub("", page), {}, "page", None, None)
    runner = Answers()
    runner.run(test, out=raise_)
    lines = page.splitlines(keepends=True)
    for example, got in reversed(runner.found):
        start = example.lineno + example.source.count("\n")
        said = re.sub(r"^$\n", "<BLANKLINE>\n", got, flags=re.MULTILINE)
        lines[start : start + example.want.count("\n")] = [textwrap.indent(said, " " * example.indent)]
    return "".join(lines)


def raise_(text: str) -> None:
    raise RuntimeError(text)


def regenerated(page: str) -> str:
    return BLOCK.sub(lambda match: fresh(match[0]), page)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(page: str) -> str:
    """The page with all that it shows renewed."""
    return answered(regenerated(page))


def difference(page: Path, renew: Callable[[str], str] = renewed) -> str:
    old = page.read_text()
    new = renew(old)
    return "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(page.relative_to(ROOT)), "now"))


def main(words: list[str]) -> int:
    chosen = [Path(word).resolve() for word in words if word != "--check"] or pages()
    if "--check" in words:
        stale = [text for page in chosen if (text := difference(page))]
        print("".join(stale), end="")
        return 1 if stale else 0
    for page in chosen:
        page.write_text(renewed(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
