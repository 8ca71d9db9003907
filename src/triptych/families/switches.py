"""Keys of a config that choose between two orders of the same rows and change nothing else in the model's code: what else it could say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .config import View
from .match import claims_of
from .records import Record, entry_point_records

MAX_SWITCHES = 4


class Setting(NamedTuple):
    """A config that differs from the one at hand in switches: `values` of those, by their dotted keys."""

    values: tuple[tuple[str, bool], ...]
    config: dict[str, Any]

    def __str__(self) -> str:
        return ", ".join(f"{key} = {'true' if value else 'false'}" for key, value in self.values)


def settings(config: Mapping[str, Any] | None, records: Sequence[Record] = ()) -> Iterator[Setting]:
    """Every other setting of the switches that the records of this config name, those first that change least.

    >>> [str(one) for one in settings({"model_type": "deepseek_v3", "rope_interleave": True})]
    ['rope_interleave = false']
    >>> one, = settings({"model_type": "kimi_k25", "text_config": {"model_type": "deepseek_v3"}})
    >>> str(one), one.config["text_config"]["rope_interleave"]
    ('text_config.rope_interleave = false', False)
    >>> list(settings({"model_type": "gpt_neox"}))
    []
    """
    config, now = config or {}, {}
    for claim in claims_of(config, (*records, *entry_point_records()), ()):
        now.update({(*_place(config, claim.view), key): bool(claim.view.get(key)) for key in claim.record.switches})
    paths = list(now)[:MAX_SWITCHES]
    for number in range(1, len(paths) + 1):
        for some in itertools.combinations(paths, number):
            other = dict(config)
            for path in some:
                other = _with(other, path, not now[path])
            yield Setting(tuple((".".join(path), not now[path]) for path in some), other)


def _place(config: Mapping[str, Any], view: View) -> tuple[str, ...]:
    """Where the table of a view lies; one that stands for a sub-config which is left out may be the whole."""
    if not view.path or config is view.config:
        return ()
    inner = config.get(view.path[0])
    rest = replace(view, path=view.path[1:])
    return (view.path[0], *(_place(inner, rest) if isinstance(inner, Mapping) else rest.path))


def _with(table: Mapping[str, Any], path: tuple[str, ...], value: bool) -> dict[str, Any]:
    key, *rest = path
    inner = table.get(key)
    return {**table, key: _with(inner if isinstance(inner, Mapping) else {}, tuple(rest), value) if rest else value}
