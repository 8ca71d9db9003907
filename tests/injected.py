"""Errors that conversions make and files suffer, each put into a right output; and the checks that people use, to see which of them see it.

python -m tests.injected        writes docs/what-verify-catches.md
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import triptych as tt
from tests import files
from triptych.errors import TriptychError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "what-verify-catches.md"
H, G, D, IN = 6, 2, 8, 20  # query heads, kv heads, head dim, columns; 3 query heads for each kv head
SIZES = {"h": H, "g": G, "d": D}
BEFORE, AFTER = "(q h|k g|v g) c p", "g (q r|k|v) p c"
NORM = "c p", "p c"
GIVEN = {"*.qkv.weight": f"{BEFORE} @ 0", "*.qkv.bias": BEFORE, "*.q_norm.weight": NORM[0]}
ROWS = (H + 2 * G) * D
Array = NDArray[np.float32]


def certificate_script() -> Any:
    """docs/check_certificate.py as a module."""
    spec = importlib.util.spec_from_file_location("check_certificate", ROOT / "docs" / "check_certificate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Files:
    """A checkpoint of two shards in memory: tensors by name, the shard of each, the metadata of each shard."""

    tensors: dict[str, Array]
    shard: dict[str, int]
    metadata: list[dict[str, str]] = field(default_factory=lambda: [{}, {}])

    def copy(self) -> Files:
        return Files({name: value.copy() for name, value in self.tensors.items()}, dict(self.shard), [dict(one) for one in self.metadata])

    def write(self, folder: Path) -> None:
        folder.mkdir()
        for number, metadata in enumerate(self.metadata):
            header: dict[str, Any] = {"__metadata__": metadata}
            data = b""
            for name, value in self.tensors.items():
                if self.shard[name] == number:
                    start = len(data)
                    data += value.tobytes()
                    header[name] = files.entry({"float32": "F32", "float16": "F16"}[value.dtype.name], list(value.shape), start, len(data))
            files.raw(folder / shard_name(number), header, data)
        weight_map = {name: shard_name(number) for name, number in self.shard.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard_name(number: int) -> str:
    return f"model-0000{number + 1}-of-00002.safetensors"


def load(folder: Path) -> Files:
    """Raises what the header makes Python raise when it is damaged."""
    out = Files({}, {})
    for number in (0, 1):
        content = (folder / shard_name(number)).read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        out.metadata[number] = header.pop("__metadata__", {})
        for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = told["data_offsets"]
            dtype = {"F32": np.float32, "F16": np.float16}[told["dtype"]]
            out.tensors[name] = np.frombuffer(content[start + first : start + last], dtype).reshape(told["shape"]).copy()
            out.shard[name] = number
    return out


def source() -> Files:
    """Two layers: fused weight and bias, two norms of one shape, a square output projection; a tensor with NaN and -0.0."""
    rng = np.random.default_rng(0)
    tensors, shard = {}, {}
    for layer in (0, 1):
        shapes = {"qkv.weight": (ROWS, IN), "qkv.bias": (ROWS,), "q_norm.weight": (D,), "k_norm.weight": (D,), "o.weight": (H * D, H * D)}
        for name, shape in shapes.items():
            tensors[f"{layer}.{name}"] = rng.standard_normal(shape).astype(np.float32)
            shard[f"{layer}.{name}"] = layer
    tensors["odd"] = np.array([np.nan, -0.0, 0.0, 1.5, np.inf], np.float32)
    shard["odd"] = 0
    return Files(tensors, shard)


class Case(NamedTuple):
    """The input, the right output, its certificate, all on disk and in memory."""

    path: Path
    out: Path
    certificate: Path
    before: Files
    after: Files


def case(folder: Path) -> Case:
    """Converted twice: the fused tensors, then the norms."""
    before = source()
    before.write(folder / "a")
    tt.convert(folder / "a", folder / "half", AFTER, layouts=GIVEN, **SIZES)
    tt.convert(folder / "half", folder / "b", NORM[1], layouts={"*.q_norm.weight": NORM[0]}, d=D)
    tt.certify(folder / "a", folder / "b", layouts=GIVEN, **SIZES).write(folder / "b.json")
    return Case(folder / "a", folder / "b", folder / "b.json", before, load(folder / "b"))


def order(layout: str) -> list[tuple[str, int, int]]:
    return [tuple(row) for row in tt.Layout(layout).rows(h=H, g=G, d=D)]


def moved(value: Array, wrong: str, before: str = BEFORE) -> Array:
    """The rows of an input tensor in the order of a layout."""
    place = {label: row for row, label in enumerate(order(before))}
    return value[[place[label] for label in order(wrong)]]


# The errors


class Error(NamedTuple):
    """`does` changes the right output in memory; `then` the written folder. `errs`: a converter that errs so errs back in the same way."""

    name: str
    does: Callable[[Files, Files], None]
    errs: bool = False
    then: Callable[[Path], None] | None = None


WEIGHT, BIAS = "1.qkv.weight", "1.qkv.bias"


def _set(name: str, value: Callable[[Files, Files], Array]) -> Callable[[Files, Files], None]:
    def does(out: Files, old: Files) -> None:
        out.tensors[name] = np.ascontiguousarray(value(out, old))

    return does


def _laid_out(wrong: str) -> Callable[[Files, Files], None]:
    def does(out: Files, old: Files) -> None:
        for name in (WEIGHT, BIAS):
            out.tensors[name] = moved(old.tensors[name], wrong)

    return does


def _relabelled(swap: Callable[[str, int, int], tuple[str, int, int]]) -> Callable[[Files, Files], None]:
    """Every row of the output is the one that has another label."""

    def does(out: Files, old: Files) -> None:
        place = {label: row for row, label in enumerate(order(BEFORE))}
        rows = [place[swap(*label)] for label in order(AFTER)]
        for name in (WEIGHT, BIAS):
            out.tensors[name] = old.tensors[name][rows]

    return does


def _rows(name: str, change: Callable[[Array], None]) -> Callable[[Files, Files], None]:
    def does(out: Files, old: Files) -> None:
        change(out.tensors[name])

    return does


def _two_rows(value: Array) -> None:
    value[[5, 17]] = value[[17, 5]]


def _bit(value: Array) -> None:
    value.view(np.uint32).reshape(-1)[7] ^= 1


def _payload(value: Array) -> None:
    value.view(np.uint32)[0] ^= 1


def _copied(value: Array) -> None:
    value[3] = value[4]


def _scaled_row(value: Array) -> None:
    value[9] *= 2


def _zeroed(value: Array) -> None:
    value[:D] = 0


def _plus_zero(value: Array) -> None:
    value[1] = 0.0


def _scaled_q(out: Files, old: Files) -> None:
    mine = np.array([part == "q" for part, _, _ in order(AFTER)])
    out.tensors[WEIGHT][mine] *= np.float32(D**-0.5)


def _half_turned(part: str, head: int, dim: int) -> tuple[str, int, int]:
    """The row of the output's pair order, with the first half of a head taken for all that is turned."""
    place = dim % (D // 2) * 2 + dim // (D // 2)  # where p c puts it
    turned = D // 2
    return part, head, place % 2 * (turned // 2) + place // 2 if place < turned else place


def _turned_back(out: Files, old: Files) -> Array:
    return old.tensors["1.q_norm.weight"].reshape(D // 2, 2).T.reshape(-1)


def _swap_layers(out: Files, old: Files) -> None:
    for name in list(out.tensors):
        if name.startswith("0."):
            other = "1." + name[2:]
            out.tensors[name], out.tensors[other] = out.tensors[other], out.tensors[name]


def _q_of_another_layer(out: Files, old: Files) -> None:
    mine = np.array([part == "q" for part, _, _ in order(AFTER)])
    for name in ("qkv.weight", "qkv.bias"):
        one, two = out.tensors[f"0.{name}"], out.tensors[f"1.{name}"]
        one[mine], two[mine] = two[mine].copy(), one[mine].copy()


def _stale(out: Files, old: Files) -> None:
    for name in out.tensors:
        if out.shard[name] == 1:
            out.tensors[name] = old.tensors[name].copy()


def _missing(out: Files, old: Files) -> None:
    del out.tensors["0.o.weight"], out.shard["0.o.weight"]


def _doubled(out: Files, old: Files) -> None:
    out.tensors["0.o.weight_1"], out.shard["0.o.weight_1"] = out.tensors["0.o.weight"], 0


def _names_exchanged(out: Files, old: Files) -> None:
    out.tensors["0.k_norm.weight"], out.tensors["1.k_norm.weight"] = out.tensors["1.k_norm.weight"], out.tensors["0.k_norm.weight"]


def _nothing(out: Files, old: Files) -> None:
    return None


def _restamped(**entries: Any) -> Callable[[Files, Files], None]:
    def does(out: Files, old: Files) -> None:
        told = json.loads(out.metadata[1]["triptych"])
        told["layouts"][WEIGHT] |= entries
        out.metadata[1]["triptych"] = json.dumps(told)

    return does


def _unstamped(out: Files, old: Files) -> None:
    for metadata in out.metadata:
        metadata.pop("triptych")


def _cut(folder: Path) -> None:
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:-4])


def _misled(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    table = json.loads(path.read_text())
    table["weight_map"]["0.o.weight"] = shard_name(1)
    path.write_text(json.dumps(table))


def _in_both(folder: Path) -> None:
    path = folder / shard_name(1)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["odd"] = files.entry("F32", [5], len(content) - start, len(content) - start + 20)
    files.raw(path, header, content[start:] + bytes(20))


ERRORS = (
    Error("two rows swapped", _rows(WEIGHT, _two_rows), errs=True),
    Error("two query heads swapped", _relabelled(lambda p, h, d: (p, {1: 4, 4: 1}.get(h, h) if p == "q" else h, d)), errs=True),
    Error("K and V swapped", _laid_out("g (q r|v|k) p c"), errs=True),
    Error("parts in another order", _laid_out("g (k|q r|v) p c"), errs=True),
    Error(
        "GQA ratio wrong: query heads dealt out in turn", _relabelled(lambda p, h, d: (p, h % 3 * 2 + h // 3 if p == "q" else h, d)), True
    ),
    Error("kv heads in another order than their query heads", _relabelled(lambda p, h, d: (p, h if p == "q" else 1 - h, d)), errs=True),
    Error("rotary order not changed", _laid_out("g (q r|k|v) c p"), errs=True),
    Error("rotary order of K alone not changed", _laid_out("g (q r p c|k c p|v p c)"), errs=True),
    Error("rotary order changed in the wrong direction", _relabelled(lambda p, h, d: (p, h, d % 2 * 4 + d // 2)), errs=True),
    Error("rotary pairs turned round: component 0 for 1", _relabelled(lambda p, h, d: (p, h, (d + D // 2) % D)), errs=True),
    Error("rotary order of V left, of Q and K changed", _laid_out("g (q r p c|k p c|v c p)"), errs=True),
    Error("half of each head turned, not all", _relabelled(_half_turned), errs=True),
    Error("not grouped, parts side by side", _laid_out("(q h|k g|v g) p c"), errs=True),
    Error("heads and dims exchanged", _laid_out("q p c h|k p c g|v p c g"), errs=True),
    Error("rows not moved at all", _laid_out(BEFORE), errs=True),
    Error("bias not moved", _set(BIAS, lambda out, old: old.tensors[BIAS]), errs=True),
    Error("norm not permuted", _set("1.q_norm.weight", lambda out, old: old.tensors["1.q_norm.weight"]), errs=True),
    Error("norm permuted in the wrong direction", _set("1.q_norm.weight", _turned_back), errs=True),
    Error("last shard stale", _stale, errs=True),
    Error("q of another layer", _q_of_another_layer, errs=True),
    Error("two layers swapped", _swap_layers, errs=True),
    Error("names of two tensors exchanged", _names_exchanged, errs=True),
    Error("transposed", _set("0.o.weight", lambda out, old: old.tensors["0.o.weight"].T), errs=True),
    Error("a row written twice, one lost", _rows(WEIGHT, _copied)),
    Error("a head never written: zeros", _rows(WEIGHT, _zeroed)),
    Error("kv head 0 written for all", _relabelled(lambda p, h, d: (p, h if p == "q" else 0, d))),
    Error("one bit of a moved row", _rows(WEIGHT, _bit)),
    Error("one bit of another tensor", _rows("0.o.weight", _bit)),
    Error("a row scaled by 2", _rows(WEIGHT, _scaled_row)),
    Error("q scaled by 1/sqrt(d)", _scaled_q),
    Error("cast to float16", _set(WEIGHT, lambda out, old: out.tensors[WEIGHT].astype(np.float16))),
    Error("cast to float16 and back", _set(WEIGHT, lambda out, old: out.tensors[WEIGHT].astype(np.float16).astype(np.float32))),
    Error("NaN payload changed", _rows("odd", _payload)),
    Error("-0.0 became 0.0", _rows("odd", _plus_zero)),
    Error("tensor missing", _missing),
    Error("tensor doubled under another name", _doubled),
    Error("tensor in two files", _nothing, then=_in_both),
    Error("file cut short", _nothing, then=_cut),
    Error("index points to the wrong shard", _nothing, then=_misled),
    Error("stamp: another layout", _restamped(layout="g (q r|v|k) p c")),
    Error("stamp: other sizes", _restamped(sizes={"g": 5, "r": 6, "p": 1, "c": 2})),
    Error("stamp: another rotary order", _restamped(rope="half")),
    Error("stamp removed", _unstamped),
)


def injected(right: Case, error: Error, folder: Path) -> Path:
    out = right.after.copy()
    error.does(out, right.before)
    out.write(folder)
    if error.then is not None:
        error.then(folder)
    return folder


# What sees them


def verify_sees(right: Case, folder: Path) -> bool:
    try:
        tt.verify(right.path, folder, layouts=GIVEN, **SIZES)
    except TriptychError:
        return True
    return False


def certificate_sees(certificate: Path, folder: Path) -> bool:
    try:
        tt.check_certificate(certificate, folder)
    except TriptychError:
        return True
    return False


def script_sees(check: Callable[..., object], certificate: Path, folder: Path, source: Path | None = None) -> bool:
    try:
        check(certificate, folder, source)
    except Exception:  # whatever ends the script with an exit code other than 0
        return True
    return False


def forged(right: Case, folder: Path, path: Path) -> Path:
    """The certificate that a tool would write which believes its own wrong output: digests and stamps of that output, layouts as meant."""
    table = json.loads(right.certificate.read_text())
    _, told, (stamps, plans) = certificate_script().read(folder)
    table["output"]["tensors"], table["stamps"], table["plan"] = told, stamps, plans
    path.write_text(json.dumps(table))
    return path


Check = Callable[[Files, Files], bool]


def _same_shapes(a: Files, b: Files) -> bool:
    kinds = [{name: (value.dtype, value.shape) for name, value in one.tensors.items()} for one in (a, b)]
    return kinds[0] == kinds[1]


def _each(check: Callable[[Array, Array], bool]) -> Check:
    def all_of(a: Files, b: Files) -> bool:
        return all(check(a.tensors[name].astype(np.float64), b.tensors[name].astype(np.float64)) for name in a.tensors if name in b.tensors)

    return all_of


def _same_sum(a: Array, b: Array) -> bool:
    sums, size = (float(np.sum(one)) for one in (a, b)), float(np.sum(np.abs(a[np.isfinite(a)])))
    return _close(*sums, 1e-6 * size)


def _same_norm(a: Array, b: Array) -> bool:
    one, two = (float(np.sqrt(np.square(value).sum())) for value in (a, b))
    return _close(one, two, 1e-6 * one)


def _close(one: float, two: float, reach: float) -> bool:
    return one == two or (one != one and two != two) or abs(one - two) <= reach


def _same_multiset(a: Array, b: Array) -> bool:
    return bool(np.array_equal(np.sort(a.ravel()), np.sort(b.ravel()), equal_nan=True))


CHECKS: dict[str, Check] = {
    "shapes": _same_shapes, "sum": _each(_same_sum), "norm": _each(_same_norm), "multiset": _each(_same_multiset),
}  # fmt: skip


def misses(right: Case, error: Error, folder: Path) -> dict[str, bool]:
    """Check -> whether it takes the wrong output for a right one. Files that cannot be read are seen by all."""
    try:
        bad = load(folder)
    except ValueError:
        return dict.fromkeys((*CHECKS, "round trip"), False)
    found = {name: check(right.before, bad) for name, check in CHECKS.items()}
    return {**found, "round trip": _is_bijection(right.before, bad) if error.errs else _comes_back(right, folder)}


def _is_bijection(a: Files, b: Files) -> bool:
    """Every number of one stands once in the other: a converter that does this and undoes it in the same way returns its input."""
    one, two = (np.sort(np.concatenate([value.ravel() for value in side.tensors.values()])) for side in (a, b))
    return bool(np.array_equal(one, two, equal_nan=True))


def _comes_back(right: Case, folder: Path) -> bool:
    """Converted back by code that is right: the input again, number by number."""
    with tempfile.TemporaryDirectory() as place:
        half, back = Path(place) / "half", Path(place) / "back"
        try:
            tt.convert(folder, half, BEFORE, h=H, g=G, d=D)
            tt.convert(half, back, NORM[0], d=D)
            found = load(back)
        except TriptychError:
            return False
    same = all(np.array_equal(value, found.tensors.get(name), equal_nan=True) for name, value in right.before.tensors.items())
    return same and _same_shapes(right.before, found)


def table() -> Iterator[tuple[str, dict[str, bool], dict[str, bool]]]:
    """(error, who misses it, what of ours sees it)."""
    check = certificate_script().check
    with tempfile.TemporaryDirectory() as place:
        right = case(Path(place))
        for number, error in enumerate(ERRORS):
            folder = injected(right, error, Path(place) / f"c{number}")
            ours = {"verify": verify_sees(right, folder), "certificate": script_sees(check, right.certificate, folder)}
            yield error.name, misses(right, error, folder), ours
            shutil.rmtree(folder)


def page() -> str:
    rows = list(table())
    columns = ("round trip", "multiset", "sum", "norm", "shapes")
    lines = [
        "# What `verify` catches, and what other checks would have missed",
        "",
        f"{len(rows)} classes of errors, each put into a right conversion of a small checkpoint:",
        f"{H} query heads, {G} kv heads, head dim {D}, from `{BEFORE}` to `{AFTER}`, the rotary norms with it.",
        "Every cell is computed: `python -m tests.injected` writes this page, a test compares it.",
        "",
        "- **round trip**: convert there and back, compare. An error of the converter is made both ways, as its code is one;",
        "  damage to a file stays on the way back.",
        "- **multiset**: the sorted numbers of each tensor; **sum**, **norm**: of each tensor, to 1e-6;",
        "  **shapes**: names, dtypes and shapes.",
        "- Numbers are compared as numbers: NaN equals NaN, -0.0 equals 0.0.",
        "- **certificate**: `docs/check_certificate.py` with the certificate of the right output, and the wrong output alone.",
        "",
        "| error | " + " | ".join(columns) + " | `verify` | certificate |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for name, missed, ours in rows:
        cells = ["**missed**" if missed[column] else "seen" for column in columns] + [
            "seen" if seen else "**missed**" for seen in ours.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    total = [sum(missed[column] for _, missed, _ in rows) for column in columns]
    seen = [sum(not ours[one] for _, _, ours in rows) for one in ("verify", "certificate")]
    lines.append("| **missed in all** | " + " | ".join(f"**{number}**" for number in (*total, *seen)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(f"{PAGE.write_text(page())} bytes in {PAGE}\n")
