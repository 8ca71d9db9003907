"""Checkpoints of many tensors and conversions that are broken off: the quick ways give what the thorough ones give, in bounded memory."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import triptych as tt
from tests import files
from triptych import portions, run
from triptych.errors import FormatError, OutputError
from triptych.formats import index_bytes, safetensors

BENCH = Path(__file__).parent.parent / "bench"
LIMIT = 300_000


def bench(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


# Headers


def good() -> dict[str, Any]:
    made = {"b": files.entry("BF16", [3, 5], 0, 30), "zero": files.entry("F32", [0, 7], 30, 30), "a.é": files.entry("F4", [2, 3], 30, 33)}
    return {**made, "scalar": files.entry("F64", [], 33, 41)}


def both(raw: bytes, size: int) -> tuple[Any, Any]:
    """What the quick and the thorough way say of a header: tensors and metadata, or None."""
    try:
        thorough = safetensors._thorough(raw, "x", size)
    except FormatError:
        thorough = None
    return safetensors._quick(raw, "x", size), thorough


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt"}, {'a"b\\': 'c\\"d\\\\', "e": "\n"}], ids=["none", "empty", "one", "escaped"]
)
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_a_good_header_is_read_the_quick_way(metadata: dict[str, str] | None, order: tuple[int, ...]) -> None:
    table = {name: good()[name] for name in (list(good())[i] for i in order)}
    raw = json.dumps({**({} if metadata is None else {"__metadata__": metadata}), **table}).encode()
    quick, thorough = both(raw, 8 + len(raw) + 41)
    assert quick is not None and quick == thorough
    assert {t.name: (t.start - 8 - len(raw), t.stop - 8 - len(raw)) for t in quick[0]} == {
        k: tuple(v["data_offsets"]) for k, v in good().items()
    }


ODD = [
    True,
    False,
    None,
    1.0,
    0.0,
    -1,
    1 << 63,
    1 << 70,
    "BF16",
    "U16",
    "é",
    "\ud800",
    [],
    {},
    [1, 2],
    [3, 5.0],
    [True, 30],
    [0, 30, 30],
    {"a": 1},
    15,
    30,
]


@given(st.sampled_from([*good(), "__metadata__"]), st.sampled_from(["dtype", "shape", "data_offsets", "more", ""]), st.sampled_from(ODD))
def test_a_changed_header_is_judged_alike(name: str, key: str, value: Any) -> None:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}, **good()}
    if key:
        table[name][key] = value
    else:
        table[name] = value
    raw = json.dumps(table).encode()
    for size in (8 + len(raw) + 41, 8 + len(raw) + 42):
        quick, thorough = both(raw, size)
        assert quick is None or quick == thorough
        assert (quick is None) == (thorough is None) or name == "__metadata__"  # a metadata key like an entry's: the thorough way reads it


@pytest.mark.parametrize("old, new", [
    (b'"dtype"', b'"dtype": "F32", "dtype"'), (b'"b"', b'"b": 1, "b"'), (b'"zero"', b'"b"'), (b'"shape"', b'"dtype"'),
    (b'"__metadata__"', b'"__metadata__": {}, "__metadata__"'), (b'"format"', b'"format": "tf", "format"'), (b"[3, 5]", b"[3, NaN]"),
    (b"[3, 5]", b"[3.0, 5]"), (b"[3, 5]", b"[" * 100_000), (b"[3, 5]", b"[3, 5"), (b"pt", b"\xff"), (b"pt", b"\\ud800"),
    (b'"b"', b'"\\ud800"'),
])  # fmt: skip
def test_a_header_with_a_fault_in_its_text_is_judged_alike(old: bytes, new: bytes) -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, **good()}).encode()
    raw = text.replace(old, new, 1)
    assert raw != text
    quick, thorough = both(raw, 8 + len(raw) + 41)
    assert quick is None and (thorough is None) == (new != b"\\ud800" or old != b"pt")


def test_headers_are_read_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.safetensors(tmp_path / "a.safetensors", {"q": ("BF16", (3, 5))})
    whole, pread = safetensors.read_header(tmp_path / "a.safetensors"), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 3), at))
    assert safetensors.read_header(tmp_path / "a.safetensors") == whole

    def fails(*args: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(FormatError, match="cannot be read"):
        safetensors.read_header(tmp_path / "a.safetensors")


@given(
    st.dictionaries(st.text(min_size=1), st.text(min_size=1), min_size=1), st.dictionaries(st.text(), st.recursive(st.integers(), st.lists))
)
def test_an_index_is_what_json_indents(weight_map: dict[str, str], metadata: dict[str, Any]) -> None:
    table = {"metadata": {**metadata, "total_size": 7}, "weight_map": dict(sorted(weight_map.items()))}
    want = (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    assert b"\xed\xa0" in want or index_bytes(weight_map, 7, metadata) == want


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), st.booleans())
def test_json_in_which_no_key_stands_twice(table: dict[str, Any], escaped: bool) -> None:
    raw = json.dumps(table, ensure_ascii=escaped).encode()
    assert safetensors.parse_json(raw, "x") == table and safetensors._texts(table) == safetensors._quoted(raw)


@pytest.mark.parametrize("text, key", [
    ('{"a": 1, "a": 1}', "a"), ('{"x": [[], {"b": [{"c": "y", "c": "y"}]}], "d": {}}', "c"), (r'{"a\"": 1, "a\u0022": 2}', 'a"'),
    (r'{"e\\": "\\", "e\u005c": "\""}', "e\\"), ('{"": {"f": "f"}, "": {}}', ""),
], ids=["flat", "nested", "escaped quote", "escaped backslash", "empty"])  # fmt: skip
def test_a_key_that_stands_twice_is_named(text: str, key: str) -> None:
    with pytest.raises(FormatError) as caught:
        safetensors.parse_json(text.encode(), "x")
    assert caught.value.fields["found"] == f"the key {key!r} stands twice"


# Memory


def test_many_tensors_are_inspected_and_planned_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 tensors, 260 GB, in files that are holes; the whole size is run by bench/inspect_terabyte.py."""
    made = bench("inspect_terabyte", monkeypatch)
    monkeypatch.setattr(made, "SHARDS", 50)
    monkeypatch.setattr(made, "LAYERS", 250)
    folder = made.checkpoint(tmp_path / "a")
    code = f"""
import triptych as tt
peak = lambda: open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]
found = tt.inspect({str(folder)!r})
print(len(found.projections), len(found.unknown), found.stored.size, peak())
made = tt.plan({str(folder)!r}, "(q|k|v) h d")
print(made.digest, made.size, peak())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    projections, unknown, size, inspected, _, planned, peak = done.stdout.split()
    assert (int(projections), int(unknown)) == (500, 0) and int(size) > 250e9 and int(planned) > int(size)
    assert int(inspected) < LIMIT / 3 and int(peak) < LIMIT / 2


# Crashes


def test_a_short_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = bench("soak_crash", monkeypatch)
    monkeypatch.setattr(portions, "LEAST", portions.LEAST)  # the soak sets it
    monkeypatch.setattr(soak, "FAULTS", {"EMFILE, once": soak.FAULTS["EMFILE, once"]})
    jobs = soak.jobs
    monkeypatch.setattr(soak, "jobs", lambda root: list(jobs(root))[::2])
    total: Counter[str] = Counter()
    for _, found in soak.soak(tmp_path, 6, 60.0):
        assert found["runs"]
        total += found
    assert not total["wrong"] and not total["leftovers"]


def test_the_soak_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = bench("soak_crash", monkeypatch)
    monkeypatch.setattr(portions, "LEAST", portions.LEAST)
    place = tmp_path / "place"
    _, job = next(soak.jobs(tmp_path))
    job = job._replace(before=soak.snapshot(tmp_path / "a"))
    shard = place / "b" / "model-00001-of-00002.safetensors"
    assert soak.state(job, place) == "complete"
    for fault in ("wrong", "leftover", "input"):
        soak.fresh(place)
        job.run()
        if fault == "wrong":
            shard.write_bytes(shard.read_bytes()[:-1])
        elif fault == "leftover":
            (place / "b" / ".x.triptych-part").touch()
        found: Counter[str] = Counter()
        soak.judge(job._replace(before={}) if fault == "input" else job, place, found)
        assert found["wrong"] == 1 and found["leftovers"] == (fault == "leftover")


def test_a_marker_that_cannot_be_read_stops_the_run_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.checkpoint(tmp_path / "a", [{"l.0.query_key_value.weight": ("BF16", (18, 5))}])
    given_, stop = {"layouts": {"*": "h (q|k|v) d"}, "h": 3}, KeyboardInterrupt

    def interrupts(size: int) -> None:
        raise stop

    with pytest.raises(stop):
        tt.convert(tmp_path / "a", tmp_path / "b", "split", progress=interrupts, **given_)
    left, made, pread = files.snapshot(tmp_path / "b"), tt.plan(tmp_path / "a", "split", tmp_path / "b", **given_), os.pread

    def fails(*args: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(OutputError, match="cannot be read"):
        run.run(made)
    assert files.snapshot(tmp_path / "b") == left
    monkeypatch.setattr(os, "pread", pread)
    tt.convert(tmp_path / "a", tmp_path / "b", "split", **given_)
    assert len(files.read(tmp_path / "b")) == 3
