"""Projections that reach no attention: what their rows are by whom they meet in elementwise products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .labels import Log, distinct, row
from .places import Place
from .roles import Reader

Pairs = dict[tuple[str, str], list[tuple[int, int]]]
"""(parameter, parameter) -> the elements that meet, each pair once in either order, in the order of the run."""


def reader(log: Log, places: Sequence[Place]) -> Reader:
    """A reader of the log that has looked at such projections too."""
    found = Reader(log, places)
    if pairs := _pairs(found):
        _weighed_sums(found, pairs)
        _modulations(found, pairs)
    return found


def _pairs(found: Reader) -> Pairs:
    pairs: Pairs = {}
    for both in (*found.log.products, *found.log.spread):
        elements = distinct(torch.stack([row(both[0]), row(both[1])])).numpy()
        owners = np.searchsorted(found.starts, elements, side="right") - 1
        for a, b in np.unique(owners, axis=1).T.tolist():
            names = found.places[a].name, found.places[b].name
            if names[0] in found.tables and names[1] in found.tables:
                continue
            met = list(map(tuple, elements[:, (owners == [[a], [b]]).all(0)].T.tolist()))
            pairs.setdefault(names, []).extend(met)
            pairs.setdefault(names[::-1], []).extend((d, c) for c, d in met)
    return pairs


def _weighed_sums(found: Reader, pairs: Pairs) -> None:
    """Linear attention: softmax(q) weighs k and is summed over the tokens, and the sum multiplies v. One query, of one row, a head."""
    soft = {element for rows in found.log.softened for element in rows.tolist()}
    for place in found.places:
        inside = pairs.get((place.name, place.name), []) if place.name not in found.tables else []
        k_of = {k: q for q, k in inside if q in soft}
        v_of = {k: v for k, v in inside if k in k_of and v not in soft and v not in k_of}
        queries = sorted(set(k_of.values()))
        if not queries or len(queries) + 2 * len(v_of) != place.rows or len({*v_of.values()}) != len(k_of):
            continue
        table = found.table(place)
        for head, q in enumerate(queries):
            table.add(place.row(q), "q", head, 0)
            for dim, k in enumerate(sorted(k for k in k_of if k_of[k] == q)):
                table.add(place.row(k), "k", head, dim)
                table.add(place.row(v_of[k]), "v", head, dim)


def _modulations(found: Reader, pairs: Pairs) -> None:
    """Focal modulation: each gate multiplies all of ctx, the sum feeds a projection, and its rows multiply q."""
    for first, vector in found.log.fed.items():
        ctx, target = vector.tolist(), found.place(first)
        home = found.place(ctx[0])
        if home.name in found.tables or (home.name, target.name) not in pairs or {found.place(e).name for e in ctx} != {home.name}:
            continue
        gates = list(dict.fromkeys(b for a, b in pairs.get((home.name, home.name), []) if a in ctx and b not in ctx))
        queries = {target.row(b): a for a, b in pairs[home.name, target.name] if a not in ctx}
        if len({*ctx, *gates, *queries.values()}) != home.rows or sorted(queries) != list(range(len(ctx))):
            continue
        table = found.table(home)
        for part, elements in (("q", [queries[i] for i in range(len(ctx))]), ("ctx", ctx), ("gates", gates)):
            for dim, element in enumerate(elements):
                table.add(home.row(element), part, 0, dim)
