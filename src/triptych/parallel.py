"""Which tensors are divided by rows, which by columns, which as a vocabulary and which not at all: data by name, rules given by hand.

The projections of the family records are divided by their layouts (`sharding.py`); this file is for all the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple

from .errors import PlanError
from .families.records import DATA
from .pieces import listed

COLUMN, ROW, VOCAB, COPY, STACKED = "column", "row", "vocab", "copy", "stacked"
BY_HAND = "by hand"
GIVEN = (COLUMN, ROW, VOCAB, COPY)
TAILS = (".weight", ".bias")


class Role(NamedTuple):
    """What a tensor is to the ranks, the axis along which it is divided (None: as usual), and who says so."""

    role: str
    axis: int | None
    source: str


class _Rule(NamedTuple):
    names: re.Pattern[str]
    types: frozenset[str]
    role: str
    axis: int | None
    source: str


def by_name(name: str, shape: tuple[int, ...], types: Container[str]) -> Role | None:
    """What the table says of a tensor that is no known projection; None when it says nothing.

    Args: types: the model types of the config.

    >>> by_name("model.layers.0.mlp.down_proj.weight", (8, 16), ())[:2], by_name("model.layers.0.mlp.down_proj.bias", (8,), ())[:2]
    (('row', 1), ('copy', None))
    """
    stem, tail = next(((name.removesuffix(tail), tail) for tail in TAILS if name.endswith(tail)), (name, ""))
    rules, words, vectors = _table()
    for rule in rules:
        if rule.names.search(stem) and (not rule.types or any(kind in types for kind in rule.types)):
            return _role(rule, tail, shape)
    if len(shape) == 1 and words.search(stem):
        return Role(COPY, None, vectors)
    return None


def _role(rule: _Rule, tail: str, shape: tuple[int, ...]) -> Role | None:
    if rule.role in (COPY, STACKED):
        return Role(rule.role, None, rule.source)
    if len(shape) == 1 and tail != ".weight":
        return Role(COPY, None, rule.source) if rule.role == ROW else Role(rule.role, 0, rule.source)
    if len(shape) != 2:
        return None
    return Role(rule.role, rule.axis if rule.axis is not None else int(rule.role == ROW), rule.source)


def by_hand(rules: Mapping[str, str], names: Iterable[str]) -> dict[str, Role]:
    """Tensor -> role, for every tensor that a glob of `rules` (NAME_GLOB -> ROLE, or ROLE @ AXIS) matches. Raises PlanError."""
    known, out = list(names), dict[str, Role]()
    for glob, text in rules.items():
        role, at, axis = (word.strip() for word in text.partition("@"))
        if role not in GIVEN or (at and not (axis.isascii() and axis.isdecimal())) or (role == COPY and at):
            raise PlanError("no such rule", found=f"{glob}={text}", expected=f"{', '.join(GIVEN)}; column @ 1 for weights [in, out]")
        met = [name for name in known if fnmatchcase(name, glob)]
        if not met:
            raise PlanError("no tensor has such a name", found=glob, expected=listed(known))
        for name in met:
            usual = None if role == COPY else int(role == ROW)
            told = Role(role, int(axis) if at else usual, BY_HAND)
            if out.setdefault(name, told) != told:
                raise PlanError("two rules are given for one tensor", tensor=name, found=f"{out[name].role} and {role}")
    return out


@lru_cache(maxsize=1)
def _table() -> tuple[tuple[_Rule, ...], re.Pattern[str], str]:
    """The rules in order, the words of vectors that every rank holds, and their source."""
    table: dict[str, Any] = json.loads((DATA / "parallel.json").read_text("utf-8"))
    rules = []
    for rule in table["rules"]:
        names = "|".join(re.escape(name).replace(r"\*", r"[^.]+") for name in rule["names"])
        pattern = re.compile(rf"(?:^|\.)(?:{names})$")
        rules.append(_Rule(pattern, frozenset(rule.get("types", ())), rule["role"], rule.get("axis"), rule["source"]))
    words = "|".join(map(re.escape, table["vectors"]["words"]))
    return tuple(rules), re.compile(rf"(?:^|[._])(?:[a-z]*{words})[^.]*$"), table["vectors"]["source"]
