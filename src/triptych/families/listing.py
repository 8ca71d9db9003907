"""The table for people: which families there are, and what a family says for a given config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import FormatError, TriptychError
from ..layout import Layout
from ..sizes import bind
from .config import View, class_defaults, towers
from .match import Claim, Hit, hits_of, index_of, tail_of
from .records import Entry, Record, all_records, find, lookup
from .sized import applies, rotary, sizes_of


def show(name: str, config: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """One dict for every tensor of a family, its sub-towers included.

    Args: name: a model type, or a record's name. config: with one, `sizes` are numbers where it tells them (of layer 0), `rope` is
    spelled out and `applies` says whether its flags choose this variant; without, `sizes` are the formulae.
    Raises FormatError when nobody knows the family, or the config is no table.

    >>> [(row["tensor"], row["layout"], row["sizes"]) for row in show("codegen", {"n_head": 8, "n_embd": 80})]
    [('h.{L}.attn.qkv_proj', 'm (q|v|k) n d', 'm=4 n=2 d=10')]
    """
    if config is not None and not isinstance(config, Mapping):
        raise FormatError("a config is a table", found=repr(config)[:60], expected="the content of config.json")
    return [_row(record, entry, view) for record, view in _parts(name, config) for entry in record.entries]


def namesakes(name: str, shape: tuple[int, ...]) -> dict[str, list[str]]:
    """Layouts that records give fused tensors of such a name, where such a matrix can have them, with the records' names.

    Names prove nothing: this is for people. First come records that say most of the name, of those first files that have no config.json.

    >>> namesakes("transformer.h.0.attn.c_attn.weight", (2304, 768))
    {'(q|k|v) h d': ['nanogpt', 'qwen'], '(q h|k g|v g) d': ['codeshell', 'gpt_bigcode'], 'h (q|k|v) d': ['gpt_bigcode']}
    """
    claims = [Claim(record, entry, View({}, ""), 1) for record in all_records() for entry in record.entries if entry.on_disk]
    hits = [hit for hit in hits_of(name, index_of(claims).get(tail_of(name), ()), {name: shape}) if not hit.part and not hit.tail]
    out: dict[str, list[str]] = {}
    for hit in sorted(hits, key=_standing):
        if _may_have(hit.claim.entry.layout, shape, hit.claim.entry.axis):
            who = out.setdefault(str(hit.claim.entry.layout), [])
            who += [hit.claim.record.name] * (hit.claim.record.name not in who)
    return out


def _standing(hit: Hit) -> tuple[int, bool]:
    said = hit.claim.entry.home + hit.claim.entry.name
    return -said.count("."), hit.claim.record.ecosystem == "transformers"


def _may_have(layout: Layout, shape: tuple[int, ...], axis: int) -> bool:
    """Whether a matrix may have a layout: where all parts have all heads, each has as many rows as there are inputs."""
    parts = [path for path in layout.paths if not path.zero]
    return len(shape) == 2 and (len({path.axes for path in parts}) > 1 or shape[axis] == len(parts) * shape[1 - axis])


def _parts(name: str, config: Mapping[str, Any] | None) -> Iterator[tuple[Record, View | None]]:
    if name in class_defaults() and not lookup(name):  # a composite: only its towers have records
        kinds = {view.type: view for view in towers({"model_type": name, **(config or {})})}
        found = [(record, view) for view in kinds.values() for record in lookup(view.type)]
        if found:
            yield from ((record, _view(record, view) if config is not None else None) for record, view in found)
            return
    for record in find(name):
        yield record, None if config is None else _view(record, View(config, name))


def _view(record: Record, view: View) -> View:
    return View(view.config, view.type, view.path, record.defaults)


def _row(record: Record, entry: Entry, view: View | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "family": record.name,
        "tensor": entry.home + entry.name,
        "stored": "fused or separate" if entry.on_disk and entry.apart else "fused" if entry.on_disk else "separate",
        "kind": entry.kind,
        "layout": str(entry.layout),
        "sizes": ", ".join(f"{axis} = {text}" for axis, text in entry.sizes) or "from the row count",
        "when": entry.when,
        "axis": entry.axis,
        "rope": entry.rope,
        "parts": dict(entry.parts),
        "companions": dict(entry.companions),
        "note": " ".join(filter(None, (record.note, entry.note))),
        "ecosystem": record.ecosystem,
        "source": entry.source,
        "checked": record.checked,
        "verified": entry.verified,
    }
    return row if view is None else row | _values(entry, view)


def _values(entry: Entry, view: View) -> dict[str, Any]:
    numbers = {"L": 0, "S": 0}
    try:
        chosen = applies(entry, view, numbers)
        sizes = bind(entry.layout, **sizes_of(entry, view, numbers))
    except TriptychError as error:
        return {"sizes": f"unknown: {error.what}", "applies": None}
    return {"sizes": sizes.of(entry.layout), "applies": chosen, "rope": rotary(entry, view, sizes, numbers)}


def families() -> list[dict[str, Any]]:
    """One dict for every record: its name, model types, ecosystem, layouts, source and verification."""
    return [
        {
            "family": record.name,
            "types": list(record.types),
            "ecosystem": record.ecosystem,
            "layouts": list(dict.fromkeys(str(entry.layout) for entry in record.entries)),
            "source": record.source,
            "checked": record.checked,
            "verified": ", ".join(dict.fromkeys(entry.verified for entry in record.entries)),
        }
        for record in all_records()
    ]
