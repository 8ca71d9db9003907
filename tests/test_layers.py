"""Imports point one way: a file imports only from files above it in this table. And the core starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "triptych"
ORDER = [
    "errors", "axes", "syntax", "layout", "sizes", "rowmap", "catalog", "pairs", "arrays", "weave", "tensors", "blocks",
    "sharding",  # the language, tensors in memory
    "families", "formats", "pieces", "remote_web", "remote_s3", "remote_gs", "remote_fsspec", "remote_hub",
    "remote", "holes",
    "rope", "stamp", "packed", "quantised", "remote_skeleton", "beside", "values",  # what a checkpoint holds
    "evidence", "head_size", "hypotheses", "rotary", "verdict", "detect", "samples", "detect_files", "agree",  # what its weights say
    "checkpoint", "unknown",
    "steps", "place", "remote_out", "relay", "moves", "outfiles", "settings", "plan", "turns", "mover", "output", "portions",
    "remote_run", "run", "run_ray",
    "progress",  # what is done with it
    "parallel", "shards", "whole", "rank_sets", "foreign", "shard_plan", "shard",  # among ranks
    "listing", "ranges", "rowproof", "rank_rows", "rank_shapes", "ranked", "expected", "verify", "certificate", "digests", "partners",
    "rowdiff", "diff",  # what was done
    "lint",  # what is wrong with it
    "drawing", "words", "columns", "render_text", "render_html", "render_ops", "render_select", "render_code", "picture",  # how it is shown
    "live", "cli_options", "cli_check", "cli_write", "cli",
]  # fmt: skip
PROOF = {
    "rowmap",
    "weave",
    "tensors",
    "steps",
    "turns",
    "mover",
    "output",
    "portions",
    "run",
    "run_ray",
    "relay",
    "moves",
    "outfiles",
    "plan",
}
"""What verify.py may not use: it proves what these did."""
HEAVY = {"torch", "ray", "transformers", "gguf", "huggingface_hub", "safetensors", "ml_dtypes", "einops", "peft",
         "fsspec", "botocore", "urllib3"}  # fmt: skip
FILES = sorted(SRC.rglob("*.py"))


def place(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imports(source: str, parts: tuple[str, ...]) -> list[str]:
    """Places in the table that a file imports at any depth, lazily or not."""
    found = []
    package = ["triptych", *parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = [*base, *(node.module.split(".") if node.module else [])]
            if full[:1] == ["triptych"]:
                found += [full[1]] if len(full) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [name.split(".")[1] for alias in node.names if (name := alias.name).startswith("triptych.")]
    return found


def outside(source: str) -> set[str]:
    """Other packages that a file imports when it is imported."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def violations(source: str, parts: tuple[str, ...]) -> list[str]:
    here = place(parts)
    allowed = ORDER[: ORDER.index(here) + 1]
    if len(parts) == 1:
        allowed = allowed[:-1]
    return [name for name in imports(source, parts) if name in ORDER and name not in allowed]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_up(path: Path) -> None:
    parts = path.relative_to(SRC).parts
    if parts == ("__init__.py",):
        return
    assert place(parts) in ORDER, "a new file needs a place in the table"
    assert violations(path.read_text(), parts) == []


@pytest.mark.parametrize("path", [p for p in FILES if "live" not in p.parts], ids=lambda p: str(p.relative_to(SRC)))
def test_the_core_needs_no_torch(path: Path) -> None:
    assert outside(path.read_text()) & HEAVY == set()


def test_the_proof_shares_no_code_with_what_it_proves() -> None:
    mine = ("listing.py", "ranges.py", "rowproof.py", "rank_rows.py", "rank_shapes.py", "ranked.py", "expected.py", "verify.py")
    for name in (*mine, "certificate.py"):
        assert set(imports((SRC / name).read_text(), (name,))) & PROOF == set()
    for name in mine:
        assert set(imports((SRC / name).read_text(), (name,))) & {"rope", "beside", "sharding", "shards", "whole"} == set()


def test_these_checks_can_fail() -> None:
    assert violations("from .rowmap import parts", ("layout.py",)) == ["rowmap"]
    assert violations("def f():\n    from ..run import convert", ("live", "trace.py")) == []
    assert violations("def f():\n    from ..cli import main", ("live", "trace.py")) == ["cli"]
    assert violations("import triptych.run", ("plan.py",)) == ["run"]
    assert outside("import torch.nn\nfrom ray import init") == {"torch", "ray"}


def loaded(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_triptych_loads_nothing_heavy() -> None:
    assert loaded("import triptych") & (HEAVY | {"numpy", "click", "rich"}) == set()
    assert loaded("import triptych; triptych.Layout('h d'); triptych.explain; triptych.convert") & HEAVY == set()
    assert "torch" in loaded("import triptych; triptych.trace"), "the check can fail"
