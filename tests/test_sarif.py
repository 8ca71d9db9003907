"""Lint reports as SARIF 2.1.0: what the standard requires, and the text of the rules' pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

import triptych as tt
from triptych.cli import main

from . import files
from .lint_cases import PAGES, TEXT, halves, healthy, neox, noise, sharded, text_of_pages


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main([*map(str, arguments)])
    return int(left.value.code or 0), capsys.readouterr().out


def check_sarif(log: dict[str, Any]) -> None:
    """The properties that SARIF 2.1.0 requires of what is used of it, and their kinds (sections 3.13 to 3.52 of the standard)."""
    assert set(log) <= {"$schema", "version", "runs"} and log["version"] == "2.1.0" and isinstance(log["runs"], list)
    for one in log["runs"]:
        assert set(one) <= {"tool", "invocations", "originalUriBaseIds", "results", "columnKind"}
        driver = one["tool"]["driver"]
        assert isinstance(driver["name"], str) and driver["name"] and isinstance(driver["version"], str)
        ids = [rule["id"] for rule in driver["rules"]]
        assert len(set(ids)) == len(ids)
        for rule in driver["rules"]:
            assert set(rule) == {"id", "shortDescription", "help", "defaultConfiguration"}
            assert rule["shortDescription"]["text"] and rule["help"]["text"], "a message string needs a text (3.12.3)"
            assert rule["defaultConfiguration"]["level"] in ("none", "note", "warning", "error")
        for invocation in one["invocations"]:
            assert isinstance(invocation["executionSuccessful"], bool), "required (3.20.14)"
        assert one["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
        for base in one["originalUriBaseIds"].values():
            assert urlparse(base["uri"]).scheme == "file" and base["uri"].endswith("/"), "ends in a slash (3.14.14)"
        for result in one["results"]:
            assert result["message"]["text"], "required (3.27.11)"
            assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
            assert result["level"] in ("none", "note", "warning", "error")
            assert all(isinstance(value, str) for value in result["partialFingerprints"].values())
            for location in result["locations"]:
                assert set(location) <= {"physicalLocation", "logicalLocations"}
                artifact = location.get("physicalLocation", {}).get("artifactLocation")
                if artifact:
                    assert artifact["uriBaseId"] in one["originalUriBaseIds"] and not urlparse(artifact["uri"]).scheme
                    assert not artifact["uri"].startswith("/") and artifact["uri"].isascii()
                for logical in location.get("logicalLocations", ()):
                    assert isinstance(logical["fullyQualifiedName"], str)


def test_sarif(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {**neox(), "a b\x1b.weight": noise(3, 2, seed=1)}
    first, second = halves(tensors)
    sharded(tmp_path / "model", first, second, more=8)
    (tmp_path / "model" / ".a b:c%\u00e4.triptych-part").write_bytes(b"")
    code, out = run(capsys, "lint", tmp_path / "model", "--sarif")
    log = json.loads(out)
    check_sarif(log)
    (one,) = log["runs"]
    assert code == 1 == one["invocations"][0]["exitCode"]
    assert [result["ruleId"] for result in one["results"]] == ["total-size", "unfinished", "unprintable-name"]
    where = one["results"][1]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert unquote(where) == ".a b:c%\u00e4.triptych-part"
    assert len({result["partialFingerprints"]["place/v1"] for result in one["results"]}) == 3
    healthy(tmp_path / "clean")
    check_sarif(tt.lint(tmp_path / "clean").to_sarif())


def test_the_check_of_sarif_can_fail(tmp_path: Path) -> None:
    healthy(tmp_path / "model")
    for spoil in (
        lambda log: log.pop("version"),
        lambda log: log["runs"][0]["tool"]["driver"].pop("name"),
        lambda log: log["runs"][0]["invocations"][0].pop("executionSuccessful"),
        lambda log: log["runs"][0]["tool"]["driver"]["rules"][0].update(help={}),
    ):
        log = tt.lint(tmp_path / "model").to_sarif()
        spoil(log)
        with pytest.raises((AssertionError, KeyError)):
            check_sarif(log)


def test_reports_that_are_read_far_from_the_pages_hold_their_text(tmp_path: Path) -> None:
    assert TEXT.read_text("utf-8") == text_of_pages(), "python -m tests.lint_cases writes it anew"
    healthy(tmp_path / "model")
    helps = {rule["id"]: rule["help"] for rule in tt.lint(tmp_path / "model").to_sarif()["runs"][0]["tool"]["driver"]["rules"]}
    assert helps.keys() == {page.stem for page in PAGES.glob("*.md")} - {"README", "weights-contradict"}
    for rule, told in helps.items():
        assert "\nWhy\n\n" in told["text"] and len(told["text"]) > 250 and "`" not in told["text"]
        assert told["text"].endswith(f"See docs/lint/{rule}.md") and "## Remedy" in told["markdown"] and "](" not in told["markdown"]


def test_names_that_no_terminal_should_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escapes, C1 controls and lone halves of surrogates, in names of tensors and files: readable JSON, nothing of them raw."""
    text = json.dumps(
        {name: files.entry("F32", [1], at * 4, at * 4 + 4) for at, name in enumerate(("a\x1b[2J", "b\x9b31m", "c\u202e", "x"))}
    )
    files.raw(tmp_path / "model.safetensors", text.replace('"x"', '"\\ud800"').encode(), bytes(16))
    (tmp_path / ".odd\x1b\udc80.triptych-part").write_bytes(b"")
    for option in ("--json", "--sarif"):
        code, out = run(capsys, "lint", tmp_path, option)
        assert code == 1 and out.strip().isprintable() and json.loads(out)
    log = json.loads(out)
    check_sarif(log)
    uris = [place["physicalLocation"]["artifactLocation"]["uri"] for one in log["runs"][0]["results"] for place in one["locations"]]
    assert ".odd%1B%80.triptych-part" in uris
