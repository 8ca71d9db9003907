"""Lint: a checkpoint -> findings, for CI. Rules look at what was read; one that is broken by a damaged file costs nothing but its finding.

Headers, indexes, config, stamps and pickles are always read; the numbers of all tensors too unless `fast`; the weights are asked about
their layout only when told. Nothing of the checkpoint is changed or run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .. import __version__
from ..errors import PlanError, TriptychError
from ..formats import without_gc
from ..holes import is_behind
from ..pieces import listed
from ..remote_skeleton import reading_urls
from . import rules_files, rules_layout, rules_values
from .model import HEADERS, VALUES, WEIGHTS, Finding, Rule
from .report import Report
from .seen import ENDINGS, Seen, look
from .values import KINDS, is_looked_at

RULES: tuple[Rule, ...] = (*rules_files.RULES, *rules_layout.RULES, *rules_values.RULES)
"""Every rule, in the order of the report."""


@reading_urls("path")
@without_gc()
def lint(
    path: str | Path,
    *,
    fast: bool = False,
    check_weights: bool = False,
    ignore: Iterable[str] = (),
    records: str | Path | None = None,
    **sizes: int,
) -> Report:
    """What is wrong with a checkpoint. docs/lint has a page for each rule.

    Args:
        path: a folder, or one file, or the URL of one; of one file it is not asked what is missing beside it.
        fast: headers, indexes, config, stamps and pickles only; no numbers are read.
        check_weights: ask `detect` too whether the weights contradict their layouts.
        ignore: ids of rules that are not run.
        records, sizes: as for `inspect`.
    Raises FormatError when there is no such place or no weights in it, PlanError for an unknown rule. Damaged files are findings.
    """
    ignored = set(ignore)
    if unknown := ignored - {rule.id for rule in RULES}:
        raise PlanError("no such rule", found=", ".join(sorted(unknown)), expected=", ".join(rule.id for rule in RULES))
    needs = {HEADERS, *([] if fast else [VALUES]), *([WEIGHTS] if check_weights else [])}
    rules = tuple(rule for rule in RULES if rule.needs in needs and rule.id not in ignored)
    seen = look(path, records, sizes)
    found = {
        rule.id: list(_findings(rule, seen)) for rule in sorted(rules, key=lambda rule: rule is RULES[0])
    }  # the first one reports on all
    return Report(
        path=str(path),
        version=__version__,
        rules=rules,
        findings=tuple(finding for rule in rules for finding in found[rule.id]),
        files=sum(len(weights.headers) for weights in seen.sets),
        tensors=sum(len(weights.tensors) for weights in seen.sets),
        read=seen.values.size if any(rule.needs == VALUES for rule in rules) else 0,
        notes=tuple(_notes(seen, fast)),
    )


def _findings(rule: Rule, seen: Seen) -> Iterable[Finding]:
    try:
        for spot in rule.check(seen):
            yield Finding(rule.id, rule.severity, *spot)
    except (TriptychError, OSError) as error:
        what = error.what if isinstance(error, TriptychError) else str(error)
        yield Finding(rule.id, rule.severity, f"this rule could not be checked: {what}", getattr(error, "fields", {}).get("file"))


def _notes(seen: Seen, fast: bool) -> Iterable[str]:
    if is_behind(seen.root) and (others := [name for name in seen.files if name.endswith(ENDINGS[1:])]):
        yield f"behind a URL only safetensors are looked at, and not {listed(others, 4)}"
    if fast:
        yield "headers only: no numbers were looked at"
        return
    left = [tensor for weights in seen.sets for tensor in weights.tensors.values() if tensor.size and not is_looked_at(tensor)]
    if left:
        dtypes = ", ".join(sorted({tensor.dtype for tensor in left}))
        yield f"the numbers of {len(left)} tensors were not looked at: {dtypes}; only those of {', '.join(KINDS)} are"
