"""Runs every command of the ```console blocks in README.md and docs/*.md and writes its real output back.

    python docs/regenerate.py            rewrite
    python docs/regenerate.py --check    exit 1 and show the difference if a page is out of date

A block marked ```console norun is left alone. Commands run in the project's folder with this interpreter's commands first on the path.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


def regenerated(page: str) -> str:
    return BLOCK.sub(lambda match: fresh(match[0]), page)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def difference(page: Path) -> str:
    old, new = page.read_text(), regenerated(page.read_text())
    return "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(page.relative_to(ROOT)), "now"))


def main() -> int:
    stale = [text for page in pages() if (text := difference(page))]
    if "--check" in sys.argv:
        print("".join(stale), end="")
        return 1 if stale else 0
    for page in pages():
        page.write_text(regenerated(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
