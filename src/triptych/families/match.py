"""Which records speak of which tensors: claims from the config, patterns from the claims, hits from the names."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from .config import View, towers
from .records import Entry, Record, generic_records, lookup

Shape = tuple[int, ...]


class Claim(NamedTuple):
    """An entry of a record, and the config that it reads. `rank`: 0 the user's, 1 of the model type, 2 of a sub-config, 3 of any."""

    record: Record
    entry: Entry
    view: View
    rank: int


class Pattern(NamedTuple):
    """What a tensor's name must look like to be the fused tensor of a claim (`part` "") or one of its parts."""

    regex: re.Pattern[str]
    holes: tuple[str, ...]  # "L", "S", in the order of the regex's groups after the first, which is the home
    claim: Claim
    part: str
    tail: int


class Hit(NamedTuple):
    """A tensor whose name fits a claim. `numbers` are {L} and {S} of the name, `home` the name up to the projection."""

    claim: Claim
    part: str
    tail: int
    numbers: tuple[tuple[str, int], ...]
    home: str


def claims_of(config: Mapping[str, Any] | None, records: Sequence[Record], named: Sequence[Record]) -> Iterator[Claim]:
    """All entries that a config chooses: `named` by hand, the user's `records`, the table's for it and its sub-configs, generic ones."""
    views = list(towers(config)) if config is not None else []
    root = views[0] if views and not views[0].path else View(config or {}, "")
    for record in named:
        yield from _entries(record, root, 0)
    for view in views:
        for record in records:
            if view.type in record.types:
                yield from _entries(record, view, 0)
        for record in lookup(view.type):
            yield from _entries(record, view, 1 + bool(view.path))
    for record in records:
        if not record.types:
            yield from _entries(record, root, 0)
    for record in generic_records():
        for view in dict.fromkeys([root, *views]):
            yield from _entries(record, view, 3)


def _entries(record: Record, view: View, rank: int) -> Iterator[Claim]:
    view = View(view.config, view.type, view.path, record.defaults)
    for entry in record.entries:
        yield Claim(record, entry, view, rank)


def tail_of(name: str) -> str:
    """The end of a name under which patterns are indexed: its last component, two when the last is weight or bias."""
    head, _, last = name.rpartition(".")
    return name[head.rfind(".") + 1 :] if last in ("weight", "bias") else last


def ending_in(names: Iterable[str], tails: Container[str]) -> list[str]:
    """The names whose `tail_of` is among `tails`, without a call for each: most of 200,000 end otherwise.

    >>> ending_in(["a.qkv.weight", "a.qkv.scale", "weight", "a.qkv"], {"qkv", "qkv.weight", "weight"})
    ['a.qkv.weight', 'weight', 'a.qkv']
    """
    return [
        name
        for name in names
        if name[name.rfind(".", 0, -7 if name[-7:] == ".weight" else -5 if name[-5:] == ".bias" else None) + 1 :] in tails
    ]


_HOLE = {"{L}": r"(?P<L>[0-9]{1,9})", "{S}": r"(?P<S>[0-9]{1,9})", "*": r"[^.]+"}


@lru_cache(maxsize=4096)
def _regex(home: str, end: str) -> re.Pattern[str]:
    pieces = [_HOLE.get(piece, re.escape(piece)) for piece in re.split(r"(\{[LS]\}|\*)", home)]
    return re.compile(rf"(?P<home>(?:.*\.)?{''.join(pieces)}){re.escape(end)}\Z", re.DOTALL)


def index_of(claims: Sequence[Claim]) -> dict[str, Sequence[Pattern]]:
    """The patterns of all claims, by the end of the name (`tail_of`)."""
    index: dict[str, list[Pattern]] = {}
    for claim in claims:
        entry = claim.entry
        names = [("", entry.name)] * entry.on_disk + list(entry.parts) * entry.apart
        for part, name in names:
            for number, tail in enumerate(entry.tails):
                regex = _regex(entry.home, name + tail)
                index.setdefault(tail_of(name + tail), []).append(Pattern(regex, tuple(regex.groupindex)[1:], claim, part, number))
    return dict(index)


def hits_of(name: str, patterns: Sequence[Pattern], names: Container[str]) -> list[Hit]:
    """The claims that a tensor's name fits; of several sub-configs those that the name speaks of."""
    hits = []
    for pattern in patterns:
        if match := pattern.regex.match(name):
            home, *rest = match.groups()
            beside = pattern.claim.entry.beside
            if not beside or all((f"{home}{other.lstrip('!')}" in names) != other.startswith("!") for other in beside):
                numbers = tuple(zip(pattern.holes, map(int, rest), strict=True)) if rest else ()
                hits.append(Hit(pattern.claim, pattern.part, pattern.tail, numbers, home))
    if not any(hit.claim.view.path for hit in hits):
        return hits
    spoken = [(_speaks_of(hit.claim.view, name), hit) for hit in hits]
    best = max((level for level, _ in spoken), default=0)
    return [hit for level, hit in spoken if level == best >= 0]


_WORDS = {
    "vision": ("vision", "visual", "image", "vit"),
    "text": ("text", "language", "llm", "decoder"),
    "audio": ("audio", "speech", "sound"),
}


def _speaks_of(view: View, name: str) -> int:
    """1 when a tensor's name speaks of the view's sub-config (`vision_config`, `vision_tower.`), -1 when of another, else 0."""
    if not view.path:
        return 0
    keys = [key.removesuffix("_config") for key in view.path]
    kinds = {kind for kind in _WORDS if any(kind in key for key in keys)}
    if any(key in name for key in keys) or any(word in name for kind in kinds for word in _WORDS[kind]):
        return 1
    return -1 if kinds and any(word in name for kind in _WORDS.keys() - kinds for word in _WORDS[kind]) else 0
