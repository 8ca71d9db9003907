"""The certificate of a conversion: a JSON file with which anybody can check the output again, with this program or without it.

It names the sha256 of every tensor of the input and of the output, and of each projection both layouts. The output alone proves the rest:
its rows, put back in the order of the input's layout, must have the digests of the input. So who trusts the digests of the input needs
neither the input nor this program; docs/check_certificate.py does the same in sixty lines. Order is computed by the slow evaluator of
`verify`: no code that converts is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import formats, ranges, stamp
from .agree import checked
from .axes import ATOMS
from .errors import FormatError, LayoutError, MismatchError, OutputError, PlanError
from .expected import Claim
from .formats import Stored, Tensor
from .layout import Layout, count
from .listing import Origin, Turn, origins
from .packed import Packed
from .pieces import in_bytes
from .ranges import Ranges
from .ranked import are_ranks
from .remote_skeleton import reading_urls
from .rope import Rope, named, sizes_of
from .rowproof import Proof
from .sizes import Sizes, bind
from .verify import prove

VERSION, MAX_ROWS = 1, 1 << 22


@dataclass(frozen=True)
class Certificate:
    """What was proved, and the content of the file."""

    table: Mapping[str, Any] = field(hash=False, repr=False)
    proof: Proof

    def to_dict(self) -> dict[str, Any]:
        return dict(self.table)

    def write(self, path: str | Path) -> None:
        """A new file. Raises PlanError when there is one, OutputError when it cannot be written."""
        content = json.dumps(self.table, indent=1).encode() + b"\n"
        try:
            with Path(path).open("xb") as file:
                file.write(content)
        except FileExistsError:
            raise PlanError("the certificate exists", where=str(path), try_="remove it, or give another name") from None
        except OSError as error:
            raise OutputError("the certificate cannot be written", where=str(path), found=error.strerror or str(error)) from None


@dataclass(frozen=True)
class Checked:
    """What was checked again: `tensors` of the output by digest, `rows` put back in the input's order; `source`: whether it was there."""

    certificate: str
    out: str
    tensors: int
    projections: int
    rows: int
    size: int
    source: str | None

    def to_dict(self) -> dict[str, Any]:
        return {"version": VERSION, "equal": True, **vars(self)}

    def __str__(self) -> str:
        whence = f"the digests of {self.source}" if self.source else "the digests of the input, which was not looked at"
        return (
            f"{self.out}: as certified by {self.certificate}; {self.tensors} tensors by digest, {in_bytes(self.size)}; "
            f"{self.rows} rows of {self.projections} projections, put back in their old order, give {whence}"
        )


def certify(
    path: str | Path,
    out: str | Path,
    to: str | Layout | None = None,
    *,
    rope: str | None = None,
    orientation: str | None = None,
    overrides: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    **sizes: int,
) -> Certificate:
    """Prove as `verify` does, then write down what a later check needs. Arguments and errors are those of `verify`.

    Raises PlanError too, for ranks, and where the record of the input is ambiguous and its weights do not settle it.
    """
    if ranks := next((place for place in (path, out) if are_ranks(place)), None):
        raise PlanError("ranks have no certificate", where=str(ranks), try_="merge them, and certify the whole")
    proved = prove(path, out, to, rope=rope, orientation=orientation, overrides=overrides, names=names, layouts=layouts, records=records,
                   **sizes)  # fmt: skip
    before, after = proved.before.stored, proved.after.stored
    checked(path, proved.before.projections, before.tensors)
    table = {
        "version": VERSION,
        "program": {"triptych": _version(), "python": platform.python_version(), "numpy": np.__version__},
        "plan": _plan(after),
        "source": {"name": Path(path).resolve().name, "tensors": _digests(before)},
        "output": {"name": Path(out).resolve().name, "tensors": _digests(after)},
        "projections": [_stated(claim) for claim in proved.claims],
        "stamps": _stamps(after),
    }
    return Certificate(table, proved.proof)


@reading_urls("certificate", "out", "source")
def check_certificate(certificate: str | Path, out: str | Path, source: str | Path | None = None) -> Checked:
    """Check an output against its certificate: its digests, its stamps, and that its rows in the old order give the input's digests.

    Args: source: the input, whose digests are then looked at too.
    Raises MismatchError at the first thing that is not as certified, FormatError for a certificate that is none.
    """
    table = formats.read_json(Path(certificate))
    try:
        return _check(table, str(certificate), out, source)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, LayoutError) as error:
        if isinstance(error, FormatError):
            raise
        found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise FormatError("the certificate makes no sense", file=str(certificate), found=found[:200]) from None


def _check(table: Mapping[str, Any], certificate: str, out: str | Path, source: str | Path | None) -> Checked:
    if table["version"] != VERSION or table["version"] is True:
        raise FormatError("a certificate of a version that this program does not know", file=certificate, expected=VERSION,
                          found=repr(table["version"]))  # fmt: skip
    stored = formats.read(out)
    if source is not None:
        _must_have(formats.read(source), table["source"]["tensors"], "the input")
    _must_have(stored, table["output"]["tensors"], "the output")
    if (_plan(stored), _stamps(stored)) != (table["plan"], table["stamps"]):
        raise MismatchError("the output's stamp is not the certified one", where=str(out), expected=table["plan"], found=_plan(stored))
    taken = {side: {name for one in table["projections"] for name in one[side]["tensors"]} for side in ("source", "output")}
    rest = {name: told for name, told in table["source"]["tensors"].items() if name not in taken["source"]}
    if rest != {name: told for name, told in table["output"]["tensors"].items() if name not in taken["output"]}:
        raise MismatchError("the other tensors of input and output are not the same by the certificate", file=certificate)
    with Ranges(stored) as reader:
        rows = sum(ranges.in_order(lambda one: _put_back(one, table["source"]["tensors"], reader), table["projections"]))
    size = sum(tensor.size for tensor in stored.tensors.values())
    name = str(source) if source is not None else None
    return Checked(certificate, str(out), len(stored.tensors), len(table["projections"]), rows, size, name)


def _must_have(stored: Stored, told: Mapping[str, Any], what: str) -> None:
    """The tensors of a checkpoint are those that the certificate tells. Raises MismatchError."""
    for name in [*told, *stored.tensors]:
        if name not in stored.tensors or name not in told:
            where = what if name in told else "the certificate"
            raise MismatchError(f"a tensor is missing in {where}", tensor=name, expected=f"{len(told)} tensors",
                                found=f"{len(stored.tensors)}")  # fmt: skip
        tensor = stored.tensors[name]
        kinds = tuple(
            f"{dtype} {list(shape)}" for dtype, shape in ((told[name]["dtype"], told[name]["shape"]), (tensor.dtype, tensor.shape))
        )
        if kinds[0] != kinds[1]:
            raise MismatchError(f"a tensor of {what} is not as certified", tensor=name, expected=kinds[0], found=kinds[1])
    for name, digest in _sha256(stored).items():
        if digest != told[name]["sha256"]:
            raise MismatchError(f"a tensor of {what} is not as certified", tensor=name, expected=f"sha256 {told[name]['sha256']}",
                                found=f"sha256 {digest}")  # fmt: skip


def _put_back(one: Mapping[str, Any], told: Mapping[str, Any], reader: Ranges) -> int:
    """The rows of one projection in the order of the input, hashed; how many there are. Raises MismatchError."""
    old, new = one["source"], one["output"]
    axis = old["axis"]
    layouts = [tuple(Layout(text) for text in side["tensors"].values()) for side in (old, new)]
    shapes = [told[name]["shape"] for name in old["tensors"]]
    _must_fill(layouts[0], _sizes(old), axis, shapes)
    _must_fill(layouts[1], _sizes(new), new["axis"], [reader.tensors[name].shape for name in new["tensors"]])
    found = origins(layouts[0], layouts[1], _sizes(old), _sizes(new))
    if isinstance(found, str):
        raise MismatchError("the layouts of the certificate do not hold the same rows", tensor=next(iter(new["tensors"])), found=found)
    _must_be_alike([*((told[name]["dtype"], told[name]["shape"], axis) for name in old["tensors"]),
                    *((reader.tensors[name].dtype, reader.tensors[name].shape, new["axis"]) for name in new["tensors"])])  # fmt: skip
    tables = [_rows(reader, reader.tensors[name], axis, new["axis"]) for name in new["tensors"]]
    if any(math.prod(shape[:axis]) != len(tables[0]) for shape in shapes):
        raise ValueError(f"shapes of {shapes} in the input")
    back = [np.zeros((math.prod(shape[:axis]), shape[axis], tables[0].shape[2]), np.uint8) for shape in shapes]
    for again in (False, True):  # rows that are one in the input may be several in the output
        for name, table, origin in zip(new["tensors"], tables, found, strict=True):
            for number, rows in enumerate(back):
                mine = origin.tensors == number
                if not again:
                    rows[:, origin.rows[mine]] = table[:, mine]
                elif not np.array_equal(rows[:, origin.rows[mine]], table[:, mine]):
                    raise MismatchError("rows that are one in the input differ in the output", tensor=name)
            if table[:, origin.tensors < 0].any():
                raise MismatchError("rows that are declared zero are not", tensor=name)
    for name, rows in zip(old["tensors"], back, strict=True):
        if hashlib.sha256(rows.data).hexdigest() != told[name]["sha256"]:
            raise MismatchError("the output's rows, put back in their old order, are not those of the input", tensor=name,
                                expected=f"sha256 {told[name]['sha256']}")  # fmt: skip
    return sum(len(origin.rows) for origin in found)


def _must_fill(layouts: Iterable[Layout], sizes: Sizes, axis: int, shapes: Iterable[Sequence[int]]) -> None:
    """That shapes fill their layouts, with no more rows than can be listed. Raises ValueError."""
    for layout, shape in zip(layouts, shapes, strict=True):
        if shape[axis] != count(layout.factors, sizes) or shape[axis] > MAX_ROWS:
            raise ValueError(f"a shape of {shape} for {layout} with {sizes.of(layout)}")


def _must_be_alike(kinds: Sequence[tuple[str, Sequence[int], int]]) -> None:
    """Tensors of one projection, on both sides, have one dtype and, but for the packed axis, one shape. Raises MismatchError."""
    found = {f"{dtype} {[*shape[:axis], *shape[axis + 1 :]]}" for dtype, shape, axis in kinds}
    if len(found) > 1:
        raise MismatchError("by the certificate dtype or shape of a projection changed", found=" and ".join(sorted(found)))


def _rows(reader: Ranges, tensor: Tensor, axis: int, packed: int) -> NDArray[np.uint8]:
    """[slices, rows, bytes of a row] of a tensor that is packed along `packed`, as one that is packed along `axis`."""
    raw = reader.read(tensor, 0, tensor.size).reshape(*tensor.shape, tensor.size // max(1, math.prod(tensor.shape)))
    whole = raw if axis == packed else raw.swapaxes(axis, packed)
    return whole.reshape(math.prod(whole.shape[:axis]), whole.shape[axis], math.prod(whole.shape[axis + 1 :]))


def _sizes(side: Mapping[str, Any]) -> Sizes:
    layouts = [Layout(text) for text in side["tensors"].values()]
    return bind(*layouts, **side["sizes"])


def _stated(claim: Claim) -> dict[str, Any]:
    """Both sides of a claim in layouts alone, which must say what was proved: rotary pairs have axes of their own in them."""
    sides = (claim.source, claim.turns[0]), (claim.target, claim.turns[1])
    layouts = [tuple(_in_pairs(piece.layout, turn) for piece in side.pieces) for side, turn in sides]
    sizes = [_sized(side, some, turn) for (side, turn), some in zip(sides, layouts, strict=True)]
    plain = [tuple(piece.layout for piece in side.pieces) for side, _ in sides]
    proved = origins(plain[0], plain[1], claim.source.sizes, claim.target.sizes, claim.turns)
    told = origins(layouts[0], layouts[1], sizes[0], sizes[1])
    if not _same(proved, told):
        found = " and ".join(map(str, layouts[1]))
        raise MismatchError("no layouts say what was proved of a projection", tensor=claim.target.name, found=found)
    return {
        word: _side(side, some, known) for word, (side, _), some, known in zip(("source", "output"), sides, layouts, sizes, strict=True)
    }


def _same(one: tuple[Origin, ...] | str, two: tuple[Origin, ...] | str) -> bool:
    if isinstance(one, str) or isinstance(two, str):
        return False
    return all(np.array_equal(a, b) for mine, theirs in zip(one, two, strict=True) for a, b in zip(mine, theirs, strict=True))


def _in_pairs(layout: Layout, turn: Turn | None) -> Layout:
    return layout if turn is None else named(layout, Rope(*turn[:3]), turn.order if turn.asked else None)


def _sized(packed: Packed, layouts: tuple[Layout, ...], turn: Turn | None) -> Sizes:
    """Sizes for layouts with pairs."""
    used = {axis for layout in layouts for axis in layout.axes}
    more = [sizes_of(piece.layout, Rope(*turn[:3]), packed.sizes) for piece in packed.pieces] if turn else []
    known = {axis: size for axis, size in packed.sizes.items() if axis in used or axis in ATOMS}
    return bind(*layouts, **known | {axis: size for table in more for axis, size in table.items() if axis in used})


def _side(packed: Packed, layouts: tuple[Layout, ...], sizes: Sizes) -> dict[str, Any]:
    used = dict.fromkeys(axis for layout in layouts for axis in layout.axes)
    tensors = {piece.tensor: str(layout) for piece, layout in zip(packed.pieces, layouts, strict=True)}
    return {"axis": packed.axis, "sizes": {axis: sizes[axis] for axis in used}, "tensors": tensors}


def _digests(stored: Stored) -> dict[str, Any]:
    digests = _sha256(stored)
    return {t.name: {"dtype": t.dtype, "shape": list(t.shape), "sha256": digests[t.name]} for t in stored.tensors.values()}


def _sha256(stored: Stored) -> dict[str, str]:
    with Ranges(stored) as reader:
        return dict(zip(stored.tensors, ranges.in_order(reader.sha256, stored.tensors.values()), strict=True))


def _plan(stored: Stored) -> list[str]:
    """The digests of the plans that the files say they were made by."""
    return sorted({str(table["plan"]) for table in _tables(stored) if "plan" in table})


def _stamps(stored: Stored) -> dict[str, Any]:
    """Tensor -> what the stamps say of it, as it stands in the files."""
    return {name: told for table in _tables(stored) for name, told in table.get("layouts", {}).items()}


def _tables(stored: Stored) -> Iterable[dict[str, Any]]:
    for file in stored.files:
        stamp.decode(file)
        if stamp.KEY in file.metadata:
            yield formats.parse_json(file.metadata[stamp.KEY].encode("utf-8", "surrogatepass"), file.file)


def _version() -> str:
    from . import __version__

    return __version__
