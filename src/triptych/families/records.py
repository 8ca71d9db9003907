"""Family records: data with provenance, read from TOML. A record says how a model type names, lays out and sizes its fused tensors.

    [[family]]
    types = ["my_decoder"]                        # model_type of config.json, or of a sub-config
    source = "my_package==1.0:model.py:12-40"     # where this was read
    [[family.tensor]]
    fused = "layers.{L}.attn.qkv"                 # end of the name; .weight and .bias follow
    layout = "(q h|k g|v g) d"
    sizes = {h = "n_heads", g = "n_kv_heads or n_heads", d = "dim / n_heads"}
    rope = "half"

docs/add-a-family.md has all keys.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ..errors import FormatError, LayoutError
from ..layout import Layout

DATA = Path(__file__).parent / "data"
GROUP = "triptych.families"
"""The entry point group under which packages offer records."""
KINDS = ("attention", "mla", "mlp", "linear")
MAX_FILE = 1 << 20
PACKAGE = "transformers==5.23.0"
"""What the sources in this package's own table are relative to, unless a record says otherwise."""


@dataclass(frozen=True)
class Entry:
    """One fused tensor of a family, or one set of separate tensors that joining would fuse.

    A tensor's name ends in home + name + tail: `layers.{L}.attn.` + `qkv` + `.weight`. `home` is a pattern: `{L}`, `{S}` are numbers,
    `*` is any one component. The first of `tails` is the weight's, packed along `axis`; the second the bias's; all others are vectors
    whose rows follow the weight's (a BatchNorm). Parts lie beside it, under home + part's name + tail. Files hold the fused tensor when
    `on_disk`, the parts when `apart`, one or the other when both; a name that is not on disk is the one by rule.
    `beside` lists siblings that must be there, or with `!` must not. `ambiguous` lists other layouts in which files of this model, with the
    same names, shapes and config, are known to exist. `verified` says how and when the claim was checked: "read" until the
    model's own code was executed.
    """

    home: str
    name: str
    tails: tuple[str, ...]
    on_disk: bool
    apart: bool
    layout: Layout
    bias_layout: Layout
    sizes: tuple[tuple[str, str], ...]
    parts: tuple[tuple[str, str], ...]
    axis: int
    when: str
    beside: tuple[str, ...]
    rope: str | None
    rotary: str
    kind: str
    source: str
    verified: str
    note: str
    companions: tuple[tuple[str, str], ...]
    ambiguous: tuple[Layout, ...] = ()


@dataclass(frozen=True)
class Record:
    """One family: its model types, and where and when its entries were read.

    `switches`: keys of the config, true or false, that choose between two orders of the same rows and change nothing else in the code.
    """

    name: str
    types: tuple[str, ...]
    ecosystem: str
    source: str
    checked: str
    note: str
    defaults: Mapping[str, Any] = field(hash=False)
    entries: tuple[Entry, ...] = ()
    switches: tuple[str, ...] = ()


_FAMILY: dict[str, Any] = dict.fromkeys(["name", "ecosystem", "package", "source", "checked", "note", "like", "template"], str)
_FAMILY |= {"types": (list, dict), "defaults": dict, "switches": list, "tensor": list}
_TENSOR: dict[str, Any] = dict.fromkeys(["join", "layout", "bias_layout", "when", "rope", "rotary", "kind", "source", "note"], str)
_TENSOR |= {
    "fused": (str, list),
    "tails": list,
    "sizes": dict,
    "parts": dict,
    "axis": int,
    "either": bool,
    "beside": list,
    "companions": dict,
    "ambiguous": list,
}


def load_records(path: str | Path) -> tuple[Record, ...]:
    """The records of one TOML file. Raises FormatError, with the file and the key, when it is not such a file."""
    place = Path(path)
    try:
        if place.stat().st_size > MAX_FILE:
            raise FormatError("a record file is too large", file=str(path), expected=f"at most {MAX_FILE} bytes")
        return parse_records(place.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError("a record file cannot be read", file=str(path), found=str(error)) from None


def parse_records(text: str, file: str, package: str = "", verified: Mapping[str, Mapping[str, str]] | None = None) -> tuple[Record, ...]:
    """The records of a TOML text.

    Args: file: its name in errors. package: what sources are relative to. verified: family -> tensor -> how and when it was executed.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError("a record file is not TOML", file=file, found=str(error)) from None
    families = table.get("family")
    if not isinstance(families, list) or not families or set(table) != {"family"}:
        raise FormatError("a record file holds [[family]] tables and nothing else", file=file, found=", ".join(table) or "nothing")
    templates: dict[str, dict[str, Any]] = {}
    records = []
    for number, raw in enumerate(families, 1):
        where = f"{file}, family {number}"
        _check(raw, _FAMILY, where)
        if "template" in raw:
            templates[raw["template"]] = raw
        else:
            records += _records(raw, {"package": package}, templates, where)
    known = verified or {}
    return tuple(
        replace(r, entries=tuple(replace(e, verified=known.get(r.name, {}).get(e.home + e.name, "read")) for e in r.entries))
        for r in records
    )


def _several(fused: object, where: str) -> list[str | None]:
    """The names of a tensor that is known under more than one."""
    if isinstance(fused, list):
        return list(_strings(fused, "fused", where))
    return [fused if isinstance(fused, str) else None]


def _check(table: object, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise FormatError("a record is a table", where=where, found=repr(table)[:60])
    for key, value in table.items():
        if key not in keys:
            raise FormatError(f"a record has no key {key!r}", where=where, expected=", ".join(keys))
        if not isinstance(value, keys[key]) or (isinstance(value, bool) and keys[key] is not bool):
            raise FormatError(f"the key {key!r} of a record has the wrong type", where=where, found=repr(value)[:60])
    return table


def _records(raw: dict[str, Any], base: dict[str, Any], templates: Mapping[str, dict[str, Any]], where: str) -> list[Record]:
    """One record, or one for each type when `types` is a table type -> source; `base` holds what neither it nor its template says."""
    if "like" in raw:
        if raw["like"] not in templates:
            raise FormatError(
                "a record is like a template that stands nowhere above it",
                where=where,
                found=raw["like"],
                expected=", ".join(templates) or "none",
            )
        base = {**base, **templates[raw["like"]]}
    merged = {**base, **raw, "defaults": {**base.get("defaults", {}), **raw.get("defaults", {})}}
    merged["tensor"] = [*raw.get("tensor", ()), *base.get("tensor", ())]
    types = raw.get("types", [])
    if isinstance(types, dict):
        return [_record({**merged, "types": [name], "source": source}, where) for name, source in types.items()]
    return [_record(merged, where)]


def _record(raw: dict[str, Any], where: str) -> Record:
    types = tuple(_strings(raw.get("types", []), "types", where))
    source = raw.get("source")
    if not source or not isinstance(source, str):
        raise FormatError("a record needs a source: where it was read", where=where)
    tensors = [_check(tensor, _TENSOR, f"{where}, tensor {i}") for i, tensor in enumerate(raw["tensor"], 1)]
    tensors = [{**tensor, "fused": name} if name else tensor for tensor in tensors for name in _several(tensor.get("fused"), where)]
    if not tensors:
        raise FormatError("a record needs at least one [[family.tensor]]", where=where)
    source = f"{raw['package']}:{source}" if raw["package"] else source
    return Record(
        name=raw.get("name") or (types[0] if types else ""),
        types=types,
        ecosystem=raw.get("ecosystem", "transformers"),
        source=source,
        checked=raw.get("checked", ""),
        note=raw.get("note", ""),
        defaults=raw["defaults"],
        entries=tuple(_entry(tensor, source, f"{where}, tensor {tensor.get('fused') or tensor.get('join')}") for tensor in tensors),
        switches=tuple(_strings(raw.get("switches", []), "switches", where)),
    )


def _entry(raw: dict[str, Any], source: str, where: str) -> Entry:
    if ("fused" in raw) == ("join" in raw):
        raise FormatError("a tensor has either `fused`, the name in the file, or `join`, the name by rule", where=where)
    home, _, name = str(raw.get("fused") or raw.get("join")).rpartition(".")
    if home.count("{L}") > 1 or home.count("{S}") > 1:
        raise FormatError("a tensor's name has at most one {L} and one {S}", where=where, found=f"{home}.{name}")
    if any("*" in word and word != "*" for word in home.split(".")):  # several in one word take for ever to match
        raise FormatError("a * stands for a whole component of a name", where=where, found=f"{home}.{name}", expected="layers.*.attn")
    try:
        layout = Layout(raw.get("layout", ""))
        bias_layout = Layout(raw.get("bias_layout", layout))
        ambiguous = tuple(map(Layout, _strings(raw.get("ambiguous", []), "ambiguous", where)))
    except LayoutError as error:
        raise FormatError("a record's layout is none", where=where, found=str(error)) from None
    given = raw.get("parts", {})
    wanted = [part for part in layout.parts if part not in zeros(layout)]
    if "join" in raw and set(given) != set(wanted):
        raise FormatError(
            "`parts` names one tensor for each part of the layout",
            where=where,
            expected=", ".join(wanted),
            found=", ".join(given) or "none",
        )
    if unknown := set(given) - set(wanted):
        raise FormatError(
            "`parts` names a part that the layout lacks", where=where, expected=", ".join(wanted), found=", ".join(sorted(unknown))
        )
    kind = raw.get("kind", "attention")
    if kind not in KINDS:
        raise FormatError("a tensor has one of these kinds", where=where, expected=", ".join(KINDS), found=kind)
    return Entry(
        home=f"{home}." if home else "",
        name=name,
        tails=tuple(_strings(raw.get("tails", [".weight", ".bias"]), "tails", where)),
        on_disk="fused" in raw,
        apart="join" in raw or bool(raw.get("either")),
        layout=layout,
        bias_layout=bias_layout,
        sizes=tuple((axis, str(value)) for axis, value in raw.get("sizes", {}).items()),
        parts=tuple((part, str(given.get(part) or part_name(part))) for part in wanted),
        axis=raw.get("axis", 0),
        when=raw.get("when", ""),
        beside=tuple(_strings(raw.get("beside", []), "beside", where)),
        rope=raw.get("rope"),
        rotary=raw.get("rotary", ""),
        kind=kind,
        source=raw.get("source", source),
        verified="read",
        note=raw.get("note", ""),
        companions=tuple((str(k), str(v)) for k, v in raw.get("companions", {}).items()),
        ambiguous=ambiguous,
    )


def _strings(values: object, key: str, where: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise FormatError(f"{key!r} is a list of names", where=where, found=repr(values)[:60])
    return values


def zeros(layout: Layout) -> set[str]:
    """The parts that a layout declares to be zero."""
    return {name for path in layout.paths if path.zero for name in path.names}


def part_name(part: str) -> str:
    """A part's name by rule.

    >>> part_name("q"), part_name("q.rot")
    ('q_proj', 'q_rot_proj')
    """
    return part.replace(".", "_") + "_proj"


@lru_cache(maxsize=1)
def _verified() -> dict[str, dict[str, str]]:
    """Family -> tensor -> how and when it was executed, as the run that did so left it."""
    verified: dict[str, dict[str, str]] = json.loads((DATA / "verified.json").read_text("utf-8"))
    return verified


@lru_cache(maxsize=1)
def _sources() -> tuple[tuple[str, str], ...]:
    return tuple((path.name, path.read_text("utf-8")) for path in sorted(DATA.glob("*.toml")))


@lru_cache(maxsize=64)
def _file(name: str) -> tuple[Record, ...]:
    return parse_records(next(text for file, text in _sources() if file == name), f"data/{name}", PACKAGE, _verified())


def all_records() -> tuple[Record, ...]:
    """Every record of the table."""
    return tuple(record for name, _ in _sources() for record in _file(name))


def generic_records() -> tuple[Record, ...]:
    """Records that hold for any model type, because the name alone fixes the layout (`nn.MultiheadAttention`)."""
    return _file("generic.toml")


@lru_cache(maxsize=256)
def lookup(model_type: str) -> tuple[Record, ...]:
    """Records of one model type; reads only the files that name it.

    >>> [record.name for record in lookup("gpt_neox")]
    ['gpt_neox']
    """
    mention = re.compile(rf'"{re.escape(model_type)}"|^{re.escape(model_type)} =', re.MULTILINE)
    return tuple(r for name, text in _sources() if mention.search(text) for r in _file(name) if model_type in r.types)


def find(name: str) -> tuple[Record, ...]:
    """Records of a family named by hand: a model type, or the name of a record.

    Raises FormatError, with the nearest names, when nobody knows it.

    >>> [str(entry.layout) for record in find("megatron-v1") for entry in record.entries]
    ['h d (q|k|v)', 'h d (k|v)']
    """
    found = lookup(name) or tuple(record for record in all_records() if record.name == name)
    if not found:
        names = {known for record in all_records() for known in (record.name, *record.types)}
        near = difflib.get_close_matches(name, names, 3)
        raise FormatError(
            f"unknown family {name[:60]!r}", try_=f"did you mean {', '.join(near)}?" if near else "`triptych families` lists all"
        )
    return found


@lru_cache(maxsize=1)
def entry_point_records() -> tuple[Record, ...]:
    """Records that installed packages offer under the entry point group `triptych.families`: each names a function that gives a path.

    Raises FormatError, naming the package, when one of them cannot be loaded.
    """
    if not _may_be_offered():
        return ()
    from importlib.metadata import entry_points  # loads as much as all the rest of a small conversion

    records: list[Record] = []
    for point in entry_points(group=GROUP):
        try:
            path = point.load()()
        except Exception as error:
            raise FormatError(f"an entry point of {GROUP} fails", where=str(point.value), found=str(error)[:200]) from error
        records += load_records(path)
    return tuple(records)


def _may_be_offered() -> bool:
    """Whether an installed package names the group, or packages lie where only Python finds them: in archives, or with other finders."""
    if any(hasattr(finder, "find_distributions") for finder in sys.meta_path if finder is not PathFinder):
        return True
    for place in map(Path, dict.fromkeys(sys.path)):
        try:
            found = [path for path in place.iterdir() if path.name.lower().endswith("-info")]
        except NotADirectoryError:
            return True
        except OSError:
            continue
        for path in found:
            with suppress(OSError):
                if GROUP.encode() in (path / "entry_points.txt").read_bytes():
                    return True
    return False
