"""Files are read for what they are: names, dtypes, byte ranges. Everything else is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import files
from tests.files import entry, raw
from triptych import formats
from triptych.errors import FormatError
from triptych.formats import BITS, header_bytes, nbytes, read, read_header
from triptych.lint import lint

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.bfloat16, torch.float16,
          torch.uint16, torch.int32, torch.float32, torch.float64, torch.complex64, torch.int64]  # fmt: skip


def test_what_the_reference_library_writes(tmp_path: Path) -> None:
    made = {f"t{i}": torch.zeros((3, 5), dtype=torch.uint8).to(dtype) for i, dtype in enumerate(DTYPES)}
    made |= {"scalar": torch.tensor(1.5), "empty": torch.zeros((0, 7)), "none": torch.zeros((4, 0, 2), dtype=torch.int64)}
    path = tmp_path / "a.safetensors"
    save_file(made, path, {"format": "pt", "ö": "∂"})
    header = read_header(path)
    content = path.read_bytes()
    assert header.metadata == {"format": "pt", "ö": "∂"} and header.file == "a.safetensors" and header.size == len(content)
    assert {tensor.name for tensor in header.tensors} == set(made)
    with safe_open(path, "pt") as reference:
        for tensor in header.tensors:
            theirs = reference.get_tensor(tensor.name)
            assert tensor.shape == tuple(theirs.shape)
            assert tensor.dtype == reference.get_slice(tensor.name).get_dtype()
            bytes_ = theirs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if theirs.numel() else b""
            assert content[tensor.start : tensor.stop] == bytes_


def test_what_we_write_the_reference_library_reads(tmp_path: Path) -> None:
    data = files.noise(24 + 6)
    header = header_bytes([("a", "BF16", (3, 4), 0, 24), ("b", "U8", (6,), 24, 30), ("e", "F32", (0, 9), 30, 30)], {"k": '"\n'})
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + data)
    assert len(header) % 4096 == 0
    loaded = load_file(path)
    assert loaded["a"].view(torch.uint8).numpy().tobytes() == data[:24] and loaded["b"].numpy().tobytes() == data[24:]
    assert loaded["e"].shape == (0, 9)
    assert read_header(path).metadata == {"k": '"\n'}


@pytest.mark.parametrize("size", [4000, 4084, 4085, 4090, 8000])
def test_the_data_begin_on_a_page(size: int) -> None:
    header = header_bytes([], {"k": "x" * size})
    assert len(header) % 4096 == 0 and len(header) - size < 4096 + 40


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_bits(dtype: str) -> None:
    assert nbytes(dtype, (8, 3)) == 3 * BITS[dtype] and nbytes(dtype, ()) == (BITS[dtype] // 8 if BITS[dtype] >= 8 else None)


A = {"a": entry("U8", [2], 0, 2)}
HOSTILE: dict[str, tuple[Any, ...]] = {
    "empty file": (b"", b"", 0, "not a safetensors file"),
    "header longer than the file": (A, b"ab", 1 << 20, "longer than the file"),
    "header of 2^63": (A, b"ab", 1 << 63, "too long"),
    "header of 2^64 - 1": (A, b"ab", (1 << 64) - 1, "too long"),
    "no JSON": (b"{abc", b"", None, "cannot be read"),
    "no table": (b"[1]", b"", None, "no table"),
    "no UTF-8": (b'{"a\xff": 1}', b"", None, "cannot be read"),
    "cut JSON": (json.dumps(A).encode()[:-3], b"ab", None, "cannot be read"),
    "deep JSON": (b"{\"a\":" * 100_000, b"", None, "nested too deeply"),
    "deep tables": (b'{"a":' * 50_000, b"", None, "nested too deeply"),
    "NaN": (b'{"a": NaN}', b"", None, "cannot be read"),
    "number of 10,000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", b"", None, "cannot be read"),
    "one name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(A["a"]).encode(),) * 2), b"ab", None, "stands twice"),
    "one key twice": (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}', b"ab", None, "stands twice"),
    "metadata twice": (b'{"__metadata__": {"a": "1", "a": "2"}}', b"", None, "stands twice"),
    "metadata no text": ({"__metadata__": {"a": 1}, **A}, b"ab", None, "no table of texts"),
    "metadata a list": ({"__metadata__": [], **A}, b"ab", None, "no table of texts"),
    "entry a number": ({"a": 3}, b"", None, "malformed"),
    "entry a text": ({"a": "dtype shape data_offsets"}, b"", None, "malformed"),
    "entry null": ({"a": None}, b"", None, "malformed"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, b"ab", None, "malformed"),
    "one key more": ({"a": {**A["a"], "x": 1}}, b"ab", None, "malformed"),
    "three offsets": ({"a": {**A["a"], "data_offsets": [0, 2, 2]}}, b"ab", None, "malformed"),
    "name no Unicode": (b'{"\\ud800": %s}' % json.dumps(A["a"]).encode(), b"ab", None, "malformed"),
    "unknown dtype": ({"a": entry("F7", [2], 0, 2)}, b"ab", None, "unknown dtype"),
    "dtype a list": ({"a": {**A["a"], "dtype": ["U8"]}}, b"ab", None, "unknown dtype"),
    "negative size": ({"a": entry("U8", [-2], 0, 2)}, b"ab", None, "natural numbers"),
    "size a float": ({"a": {**A["a"], "shape": [2.0]}}, b"ab", None, "natural numbers"),
    "size a bool": ({"a": {**A["a"], "shape": [True]}}, b"a", None, "natural numbers"),
    "size of 2^63": ({"a": entry("U8", [1 << 63], 0, 2)}, b"ab", None, "natural numbers"),
    "65 dims": ({"a": entry("U8", [1] * 65, 0, 1)}, b"a", None, "natural numbers"),
    "sizes that overflow": ({"a": entry("U8", [1 << 40, 1 << 40], 0, 2)}, b"ab", None, "do not fit its shape"),
    "offset negative": ({"a": entry("U8", [2], -1, 1)}, b"ab", None, "offset"),
    "offset a float": (b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2.0]}}', b"ab", None, "offset"),
    "offset of 2^63": ({"a": entry("U8", [2], 0, 1 << 63)}, b"ab", None, "offset"),
    "offsets turned round": ({"a": entry("U8", [2], 2, 0)}, b"ab", None, "do not fit its shape"),
    "bytes too few": ({"a": entry("F32", [2], 0, 7)}, b"abcdefg", None, "do not fit its shape"),
    "bits that fill no byte": ({"a": entry("F4", [3], 0, 2)}, b"ab", None, "whole number of bytes"),
    "overlap": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"abcdef", None, "overlap"),
    "the same bytes twice": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, b"abcd", None, "overlap"),
    "hole": ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, b"abcde", None, "hole"),
    "hole at the beginning": ({"a": entry("U8", [2], 1, 3)}, b"abc", None, "hole"),
    "cut short": (A, b"a", None, "cut short"),
    "bytes behind": (A, b"abc", None, "behind the last tensor"),
    "bytes and no tensor": ({}, b"abc", None, "behind the last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("header, data, length, match", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes, length: int | None, match: str) -> None:
    path = raw(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    text = caught.value.text()
    assert match in text and "x.safetensors" in text and len(text) < 900
    assert all(line.isprintable() for line in text.splitlines())


def test_a_file_of_seven_bytes_a_folder_and_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "seven").write_bytes(b"1234567")
    os.mkfifo(tmp_path / "pipe")
    for name, match in (
        ("seven", "not a safetensors file"),
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
        ("no", "cannot be read"),
    ):
        with pytest.raises(FormatError, match=match):
            read_header(tmp_path / name)


SHARDS = [{"a": ("BF16", (3, 5)), "b": ("F32", (7,))}, {"c": ("U8", (2, 2))}]


def test_folders(tmp_path: Path) -> None:
    parts = files.checkpoint(tmp_path / "sharded", SHARDS, {"model_type": "x"})
    (tmp_path / "sharded" / "sub").mkdir()
    (tmp_path / "sharded" / "sub" / "tokens.txt").write_text("t")
    (tmp_path / "sharded" / ".cache").mkdir()
    (tmp_path / "sharded" / ".cache" / "hidden").write_text("t")
    stored = read(tmp_path / "sharded")
    assert stored.is_folder and stored.index == "model.safetensors.index.json" and dict(stored.index_metadata)["note"] == "kept"
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert {name: tensor.file for name, tensor in stored.tensors.items()} == {"a": first, "b": first, "c": second}
    assert stored.size == sum(map(len, parts.values()))
    assert [(other.name, other.size) for other in stored.others] == [("config.json", 19), ("sub/tokens.txt", 1)]
    one = read(tmp_path / "sharded" / "model-00001-of-00002.safetensors")
    assert not one.is_folder and set(one.tensors) == {"a", "b"} and one.others == ()


def test_other_names_of_the_only_file(tmp_path: Path) -> None:
    files.safetensors(tmp_path / "adapter_model.safetensors", SHARDS[0])
    assert [file.file for file in read(tmp_path).files] == ["adapter_model.safetensors"]


def one_file(folder: Path) -> Path:
    folder.mkdir()
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    return folder


def test_a_folder_that_cannot_be_read_is_not_left_out_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = one_file(tmp_path / "a")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"y")
    assert [other.name for other in read(folder).others] == ["onnx/model.onnx"]
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("onnx"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FormatError, match="a folder cannot be read") as caught:
        read(folder)
    assert caught.value.fields["file"] == str(folder / "onnx")
    assert [(one.rule, one.file) for one in lint(folder).findings] == [("unreadable-file", "onnx")]


def test_a_link_to_a_folder_is_left_out_and_said_so(tmp_path: Path) -> None:
    folder = one_file(tmp_path / "a")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b").write_bytes(b"y")
    (folder / "link").symlink_to(tmp_path / "far")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "c").write_bytes(b"z")
    found = read(folder)
    assert (found.others, found.notes) == ((), ("link is left out: a link to a folder",))


def test_a_snapshot_of_links_is_read_through_them(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    parts = files.safetensors(tmp_path / "blobs" / "0123", SHARDS[0])
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    stored = read(tmp_path / "snapshot")
    assert {name: tensor.size for name, tensor in stored.tensors.items()} == {name: len(data) for name, data in parts.items()}


NAMES = [
    "../x",
    "/etc/passwd",
    "a/b.safetensors",
    "a\\b.safetensors",
    "C:x.safetensors",
    "..",
    ".",
    "",
    "x\u0000y",
    "x\u001b[31m",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    files.checkpoint(tmp_path / "m", SHARDS)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="outside its folder"):
        read(tmp_path / "m")


INDEXES: dict[str, tuple[Any, str]] = {
    "no table": ([1], "no table"),
    "no weight map": ({"metadata": {}}, "not an index"),
    "empty weight map": ({"weight_map": {}}, "not an index"),
    "metadata a list": ({"metadata": [], "weight_map": {"a": "model-00001-of-00002.safetensors"}}, "not an index"),
    "file a number": ({"weight_map": {"a": 3}}, "outside its folder"),
    "a file that is not there": ({"weight_map": {"a": "model-00009-of-00002.safetensors"}}, "are missing"),
    "a file that is none": ({"weight_map": {"a": "config.json"}}, "header"),
    "a tensor that is not there": ({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors",
                                                   "z": "model-00001-of-00002.safetensors"}}, "index and shards disagree"),
    "a tensor in another file": ({"weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors",
                                                 "c": "model-00002-of-00002.safetensors"}}, "index and shards disagree"),
    "a tensor left out": ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "index and shards disagree"),
}  # fmt: skip


@pytest.mark.parametrize("index, match", INDEXES.values(), ids=INDEXES)
def test_wrong_indexes(tmp_path: Path, index: Any, match: str) -> None:
    files.checkpoint(tmp_path / "m", SHARDS, {"x": 1})
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=match):
        read(tmp_path / "m")


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "m", [SHARDS[0], {"c": ("U8", (2, 2)), "d": ("U8", (1,))}])
    files.safetensors(tmp_path / "m" / "model-00002-of-00002.safetensors", {"c": ("U8", (2, 2)), "d": ("U8", (1,)), "a": ("BF16", (3, 5))})
    with pytest.raises(FormatError, match="a tensor lies in two files"):
        read(tmp_path / "m")


def test_which_checkpoint_of_a_folder(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "two", SHARDS)
    files.safetensors(tmp_path / "two" / "model.safetensors", SHARDS[0])
    with pytest.raises(FormatError, match="more than one checkpoint"):
        read(tmp_path / "two")
    (tmp_path / "none").mkdir()
    with pytest.raises(FormatError, match="no checkpoint in this folder"):
        read(tmp_path / "none")
    with pytest.raises(FormatError, match="no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="an index is not a checkpoint"):
        read(tmp_path / "two" / "model.safetensors.index.json")


def test_configs(tmp_path: Path) -> None:
    files.checkpoint(tmp_path, [SHARDS[0]])
    assert formats.read_config(read(tmp_path)) is None
    for text, match in (("{", "cannot be read"), ("[]", "no table"), ('{"a": ' * 3000, "nested too deeply")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(FormatError, match=match):
            formats.read_config(read(tmp_path))
