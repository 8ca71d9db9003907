"""GGUF files: what we say of a file against what the gguf package says of it, and rows of packed numbers moved as they are."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from hypothesis import given, settings
from hypothesis import strategies as st

import triptych as tt
from triptych import rowmap
from triptych.errors import FormatError, PlanError
from triptych.formats.gguf import BLOCKS, TYPES, GgufFile, Long, nbytes, read
from triptych.formats.safetensors import BITS
from triptych.formats.safetensors import nbytes as plain_nbytes

from .crafted import gguf_file, item

KINDS = sorted(GGML_QUANT_SIZES, key=int)
PACKED = [GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "BF16", "F16")]


def writer(path: Path, **options: Any) -> GGUFWriter:
    out = GGUFWriter(path, "llama", **options)
    out.add_block_count(3)
    return out


def finish(out: GGUFWriter) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def noise(kind: GGMLQuantizationType, *shape: int, seed: int = 5) -> np.ndarray:
    """Random bytes as the rows of a tensor of any type."""
    block, size = GGML_QUANT_SIZES[kind]
    return np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)


def check(path: Path) -> GgufFile:
    """Names, types, shapes and byte ranges are those that the gguf package finds; with head and gaps they are the whole file."""
    found, theirs = read(path), GGUFReader(path)
    ours = {tensor.name: tensor for tensor in found.header.tensors}
    assert set(ours) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        mine = ours[tensor.name]
        assert (mine.dtype, mine.shape) == (tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape)))
        assert (mine.start, mine.size) == (tensor.data_offset, tensor.n_bytes)
        assert path.read_bytes()[mine.start : mine.stop] == tensor.data.tobytes()
    assert (found.data, found.alignment) == (theirs.data_offset, theirs.alignment)
    ranges = sorted([(0, found.data), *((tensor.start, tensor.stop) for tensor in found.header.tensors), *found.gaps])
    assert [stop for _, stop in ranges[:-1]] == [start for start, _ in ranges[1:]] and ranges[-1][1] == path.stat().st_size
    return found


def test_the_table_of_types_is_that_of_the_gguf_package() -> None:
    assert {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in KINDS} == TYPES
    for name in set(BLOCKS) & set(BITS):
        assert nbytes(name, (3, 5)) == plain_nbytes(name, (3, 5))
    assert nbytes("F8_E4M3", (3, 5)) == 15


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    out = writer(tmp_path / "a.gguf")
    block = GGML_QUANT_SIZES[kind][0]
    for name, shape in {"flat": (3 * block,), "plane": (5, 2 * block), "experts": (2, 3, block), "four": (2, 3, 5, block)}.items():
        out.add_tensor(name, noise(kind, *shape), raw_dtype=kind)
    finish(out)
    found = check(tmp_path / "a.gguf")
    assert [tensor.shape for tensor in found.header.tensors] == [(3 * block,), (5, 2 * block), (2, 3, block), (2, 3, 5, block)]


def test_every_kind_of_metadata(tmp_path: Path) -> None:
    out = writer(tmp_path / "a.gguf")
    numbers = {"uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 1 << 31, "int32": -(1 << 31),
               "uint64": 1 << 63, "int64": -(1 << 63), "float32": 0.5, "float64": 1e300, "bool": True, "string": "\N{SNOWMAN}"}  # fmt: skip
    for kind, value in numbers.items():
        getattr(out, f"add_{kind}")(kind, value)
    lists = {"l.int": [1, 2, 3], "l.float": [0.5, -1.5], "l.bool": [True, False, True], "l.text": ["a", "", "bc"]}
    for key, value in lists.items():
        out.add_array(key, value)
    out.add_array("l.long", list(range(5000)))
    out.add_array("l.words", [f"word {i}" for i in range(5000)])
    finish(out)
    found, theirs = check(tmp_path / "a.gguf"), GGUFReader(tmp_path / "a.gguf")
    assert {key: found.metadata[key] for key in numbers} == numbers
    assert {key: list(found.metadata[key]) for key in lists} == lists
    assert set(found.metadata) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key in (*numbers, *lists):
        assert theirs.fields[key].contents() == (lists | numbers)[key]
    whole = (tmp_path / "a.gguf").read_bytes()
    numbers_at, words_at = found.metadata["l.long"], found.metadata["l.words"]
    assert isinstance(numbers_at, Long) and isinstance(words_at, Long)
    assert np.frombuffer(whole[numbers_at.start : numbers_at.stop], np.int32).tolist() == list(range(5000))
    assert whole[words_at.start : words_at.stop] == b"".join(
        len(w).to_bytes(8, "little") + w for w in (b"word %d" % i for i in range(5000))
    )


def test_lists_of_lists() -> None:
    """The gguf package writes none, so the bytes are laid by hand."""
    inner = [struct.pack("<IQ", 1, 2) + b"\x01\xff", struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2) + b"ab"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        path.write_bytes(gguf_file([item(b"k", 9, struct.pack("<IQ", 9, 2) + b"".join(inner))]))
        assert read(path).metadata == {"k": ((1, -1), ("ab",))}


def test_alignment_version_and_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for align in (8, 64, 4096):
        out = writer(path)
        out.add_custom_alignment(align)
        out.add_tensor("a", np.arange(3, dtype=np.float32))
        out.add_tensor("b", np.arange(5, dtype=np.int16))
        finish(out)
        found = check(path)
        assert found.alignment == align and all(tensor.start % align == 0 for tensor in found.header.tensors)
    raw = bytearray(path.read_bytes())
    raw[4] = 2
    path.write_bytes(raw)
    assert check(path).version == 2
    raw = raw[: found.header.tensors[-1].stop]  # llama.cpp reads a file without its last padding too
    path.write_bytes(raw)
    assert [stop for _, stop in read(path).gaps][-1] == found.header.tensors[-1].start
    out = writer(path)
    finish(out)
    assert read(path).header.tensors == ()
    assert read(path).data <= path.stat().st_size


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    out = writer(path, endianess=gguf.GGUFEndian.BIG)
    out.add_tensor("a", np.arange(3, dtype=np.float32))
    finish(out)
    with pytest.raises(PlanError, match="big-endian"):
        read(path)
    path.write_bytes(b"GGUF\1\0\0\0" + bytes(100))
    with pytest.raises(PlanError, match="a version of GGUF that is not read"):
        read(path)


# Rows moved as they are


def moved(path: Path, out: Path, rows: dict[str, np.ndarray]) -> None:
    """The same file with the rows of some tensors in another order: head and padding copied, rows gathered as bytes."""
    found, whole = read(path), np.fromfile(path, np.uint8)
    new = np.zeros_like(whole)
    for start, stop in [(0, found.data), *found.gaps]:
        new[start:stop] = whole[start:stop]
    for tensor in found.header.tensors:
        data = whole[tensor.start : tensor.stop]
        if tensor.name in rows:
            width = nbytes(tensor.dtype, tensor.shape[1:])
            data = data.reshape(tensor.shape[0], width)[rows[tensor.name]].reshape(-1)
        new[tensor.start : tensor.stop] = data
    new.tofile(out)


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_moving_packed_rows_is_moving_their_numbers(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """Interleaved rotary rows to half-split ones and back, against unpack, permute with reshape and transpose."""
    heads, kv, dim, columns = 6, 2, 10, 96
    out = writer(tmp_path / "a.gguf")
    rng = np.random.default_rng(3)
    values = {
        "q": rng.normal(size=(heads * dim, columns)),
        "k": rng.normal(size=(kv * dim, columns)),
        "v": rng.normal(size=(kv * dim, columns)),
    }
    for name, value in values.items():
        out.add_tensor(name, quants.quantize(value.astype(np.float32), kind), raw_dtype=kind)
    out.add_tensor("norm", np.arange(7, dtype=np.float32))
    finish(out)
    sizes = tt.bind(tt.Layout("(q h p c)"), tt.Layout("(k g p c)"), h=heads, g=kv, d=dim)
    maps = {
        part: rowmap.between(tt.Layout(f"({part} {axis} p c)"), tt.Layout(f"({part} {axis} c p)"), sizes)
        for part, axis in (("q", "h"), ("k", "g"))
    }
    moved(tmp_path / "a.gguf", tmp_path / "b.gguf", {part: map.indices for part, map in maps.items()})
    before, after = GGUFReader(tmp_path / "a.gguf"), GGUFReader(tmp_path / "b.gguf")
    for old, new in zip(before.tensors, after.tensors, strict=True):
        expected = quants.dequantize(old.data, old.tensor_type)
        if old.name in maps:
            assert not np.array_equal(old.data, new.data)
            expected = expected.reshape(-1, dim // 2, 2, columns).swapaxes(1, 2).reshape(expected.shape)
        assert np.array_equal(quants.dequantize(new.data, new.tensor_type), expected)
    moved(tmp_path / "b.gguf", tmp_path / "c.gguf", {part: map.invert().indices for part, map in maps.items()})
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 3)), max_size=6),
    st.sampled_from([8, 32, 256]),
)
def test_random_files_equal_the_gguf_package(tensors: list[tuple[GGMLQuantizationType, list[int], int]], align: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        out = writer(path)
        out.add_custom_alignment(align)
        for i, (kind, shape, blocks) in enumerate(tensors):
            out.add_tensor(f"t{i}", noise(kind, *shape, blocks * GGML_QUANT_SIZES[kind][0], seed=i), raw_dtype=kind)
        finish(out)
        if tensors:
            check(path)
        else:
            assert read(path).header.tensors == ()


def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = writer(tmp_path / "a.gguf")
    out.add_tensor("a", noise(GGMLQuantizationType.Q4_0, 3, 64), raw_dtype=GGMLQuantizationType.Q4_0)
    finish(out)
    check(tmp_path / "a.gguf")
    monkeypatch.setitem(BLOCKS, "Q4_0", (32, 34))
    with pytest.raises((AssertionError, FormatError)):
        check(tmp_path / "a.gguf")
