"""What the pages show is what the commands print, and what their Python shows is what Python says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("regenerate", ROOT / "docs" / "regenerate.py")
regenerate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(regenerate)


@pytest.mark.parametrize("page", regenerate.pages(), ids=lambda p: p.name)
def test_outputs_on_the_page_are_real(page: Path) -> None:
    assert regenerate.difference(page, regenerate.regenerated) == ""


@pytest.mark.parametrize("page", regenerate.pages(), ids=lambda p: p.name)
def test_python_on_the_page_is_real(page: Path) -> None:
    assert regenerate.difference(page, regenerate.answered) == ""


def test_a_stale_output_is_seen() -> None:
    assert regenerate.regenerated("```console\n$ echo new\nold\n```") == "```console\n$ echo new\nnew\n```"
    assert regenerate.regenerated("```console\n$ exit 3\n```") == "```console\n$ exit 3\nexit code 3\n```"
    assert regenerate.answered("```python\n>>> 1 + 1\n3\n>>> 2 + 2\n```\n") == "```python\n>>> 1 + 1\n2\n>>> 2 + 2\n4\n```\n"
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        regenerate.answered("```python\n>>> 1 / 0\n```\n")
