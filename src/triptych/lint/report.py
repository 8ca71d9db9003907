"""A lint report as text, as JSON, and as SARIF 2.1.0."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..pieces import in_bytes, shown, star
from .model import ERROR, Finding, Rule
from .pages import TEXTS

VERSION = 1
SARIF, SCHEMA = "2.1.0", "https://json.schemastore.org/sarif-2.1.0.json"
BASE = "CHECKPOINT"


@dataclass(frozen=True)
class Report:
    """What lint found. `rules`: those that were run; `read`: bytes of tensors that were looked at; `notes`: what was not looked at."""

    path: str
    version: str
    rules: tuple[Rule, ...] = field(repr=False)
    findings: tuple[Finding, ...]
    files: int
    tensors: int
    read: int
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> int:
        return sum(one.severity == ERROR for one in self.findings)

    @property
    def warnings(self) -> int:
        return len(self.findings) - self.errors

    def exit_code(self, strict: bool = False) -> int:
        """1 with a finding of severity error, or with `strict` any finding; else 0."""
        return int(bool(self.findings) if strict else self.errors > 0)

    def to_dict(self) -> dict[str, Any]:
        counts = {"errors": self.errors, "warnings": self.warnings, "files": self.files, "tensors": self.tensors, "bytes_read": self.read}
        rules = {"rules": [one.id for one in self.rules], "notes": list(self.notes)}
        return {"version": VERSION, "path": self.path, **counts, **rules, "findings": [one.to_dict() for one in self.findings]}

    def __str__(self) -> str:
        what = f"{_number(self.errors, 'error')}, {_number(self.warnings, 'warning')}"
        lines = [f"{shown(self.path)}   {what if self.findings else 'clean'}"]
        lines += [f"  {_number(self.files, 'file')}, {_number(self.tensors, 'tensor')}, {in_bytes(self.read)} of them read"]
        for rule in self.rules:
            if found := [one for one in self.findings if one.rule == rule.id]:
                lines += ["", f"  {rule.severity:<8} {rule.id}: {rule.title}"]
                for first, count in _alike(found):
                    where = "   ".join(shown(word) for word in (first.tensor, first.file) if word)
                    lines += [f"    {where}" + (f"   and {count - 1} like it" if count > 1 else ""), f"      {shown(first.message)}"]
                lines += [f"    try {rule.remedy}   ({rule.page})"]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_sarif(self, strict: bool = False) -> dict[str, Any]:
        """A SARIF 2.1.0 log of one run. Places are relative to the checkpoint's folder; helps are the text of the rules' pages."""
        place = {rule.id: number for number, rule in enumerate(self.rules)}
        driver = {"name": "triptych", "version": self.version, "rules": [_descriptor(rule) for rule in self.rules]}
        folder = Path(self.path) if Path(self.path).is_dir() else Path(self.path).parent
        run = {
            "tool": {"driver": driver},
            "invocations": [{"executionSuccessful": True, "exitCode": self.exit_code(strict)}],
            "originalUriBaseIds": {BASE: {"uri": folder.resolve().as_uri() + "/"}},
            "results": [_result(one, place[one.rule]) for one in self.findings],
            "columnKind": "unicodeCodePoints",
        }
        return {"$schema": SCHEMA, "version": SARIF, "runs": [run]}


def _descriptor(rule: Rule) -> dict[str, Any]:
    text = f"{TEXTS[rule.id]}\n\nSee {rule.page}"
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.title},
        "help": {"text": re.sub(r"^#+ |`", "", text, flags=re.MULTILINE), "markdown": text},
        "defaultConfiguration": {"level": rule.severity},
    }


def _result(one: Finding, place: int) -> dict[str, Any]:
    location: dict[str, Any] = {}
    if one.file:
        location["physicalLocation"] = {"artifactLocation": {"uri": quote(_raw(one.file)), "uriBaseId": BASE}}
    if one.tensor:
        location["logicalLocations"] = [{"fullyQualifiedName": shown(one.tensor), "kind": "resource"}]
    name = "/".join((one.rule, one.file or "", one.tensor or ""))
    return {
        "ruleId": one.rule,
        "ruleIndex": place,
        "level": one.severity,
        "message": {"text": shown(one.message)},
        "locations": [location] if location else [],
        "partialFingerprints": {"place/v1": hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()},
    }


def _raw(name: str) -> bytes:
    """A name as the file system has it; one that no file can have, as an index tells it."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")


def _alike(findings: Iterable[Finding]) -> Iterator[tuple[Finding, int]]:
    """The first of those whose names and sentences differ only in numbers, and how many there are."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:
        key = (star(one.tensor or ""), re.sub(r"\d+", "*", one.file or ""), re.sub(r"\d+", "*", one.message))
        groups.setdefault(key, []).append(one)
    yield from ((group[0], len(group)) for group in groups.values())


def _number(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
