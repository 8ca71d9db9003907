"""What lint is made of: rules, what a rule saw, and findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

ERROR, WARNING = "error", "warning"
HEADERS, VALUES, WEIGHTS = "headers", "values", "weights"
"""What a rule reads: names, headers and indexes; the numbers of every tensor; what `detect` makes of the weights."""
PAGES = "docs/lint"


class Spot(NamedTuple):
    """What a rule saw, in one sentence, and where."""

    message: str
    file: str | None = None
    tensor: str | None = None


Check = Callable[[Any], Iterable[Spot]]
"""Looks at a `Seen` (seen.py)."""


@dataclass(frozen=True)
class Rule:
    """One check. `id` is the name of its page, `remedy` one sentence on what to do; `check` gives a spot for all that is wrong."""

    id: str
    severity: str
    title: str
    remedy: str
    needs: str
    check: Check

    @property
    def page(self) -> str:
        """Its page, relative to the project's folder."""
        return f"{PAGES}/{self.id}.md"


def rule(id: str, severity: str, title: str, remedy: str, needs: str = HEADERS) -> Callable[[Check], Rule]:
    """Makes a rule of a function."""

    def decorate(check: Check) -> Rule:
        return Rule(id, severity, title, remedy, needs, check)

    return decorate


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: the rule's id and severity, one sentence, and where."""

    rule: str
    severity: str
    message: str
    file: str | None = None
    tensor: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("rule", "severity", "message", "file", "tensor")}
