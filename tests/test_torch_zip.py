"""Torch files: what we say of a file against what torch.load and safetensors say of it."""

from __future__ import annotations

import argparse
import io
import math
import pickle
import tempfile
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.errors import FormatError, PlanError
from triptych.formats import Tensor
from triptych.formats.safetensors import read_header as read_safetensors
from triptych.formats.torch_zip import DTYPES, Strided, TorchFile, read
from triptych.formats.unpickle import load

from . import crafted
from .crafted import archive

WORDS = sorted(DTYPES)


def saved(value: object, path: Path, **options: Any) -> TorchFile:
    torch.save(value, path, **options)
    return read(path)


def noise(dtype: torch.dtype, *shape: int, seed: int = 7) -> torch.Tensor:
    """Random bytes as a tensor, NaNs of all kinds included."""
    width = torch.empty(0, dtype=dtype).element_size()
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, math.prod(shape) * width, dtype=np.uint8)
    return torch.frombuffer(bytearray(raw.tobytes()), dtype=dtype).view(shape) if len(raw) else torch.empty(shape, dtype=dtype)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in its own order, by its storage and strides alone."""
    size = tensor.element_size()
    whole = np.frombuffer(bytes(tensor.untyped_storage()), np.uint8)
    return gathered(whole[tensor.storage_offset() * size :], tuple(tensor.shape), tuple(s * size for s in tensor.stride()), size)


def gathered(data: np.ndarray, shape: tuple[int, ...], strides: tuple[int, ...], width: int) -> bytes:
    if not math.prod(shape):
        return b""
    return np.lib.stride_tricks.as_strided(data, (*shape, width), (*strides, 1)).tobytes()


def our_bytes(path: Path, found: Tensor | Strided) -> bytes:
    data = np.fromfile(path, np.uint8)
    if isinstance(found, Tensor):
        return data[found.start : found.stop].tobytes()
    width = torch.empty(0, dtype=getattr(torch, next(word for word, short in DTYPES.items() if short == found.dtype))).element_size()
    return gathered(data[found.start :], found.shape, found.strides, width)


def check(path: Path, expected: dict[str, torch.Tensor]) -> TorchFile:
    """Every tensor is there, under its name, with its dtype, shape and bytes."""
    found = read(path)
    ours: dict[str, Tensor | Strided] = {one.name: one for one in (*found.header.tensors, *found.strided)}
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if tensor.dtype == torch.float4_e2m1fn_x2:
            shape = (*shape[:-1], 2 * shape[-1])
        assert (ours[name].dtype, ours[name].shape) == (DTYPES[str(tensor.dtype).removeprefix("torch.")], shape)
        assert our_bytes(path, ours[name]) == raw_bytes(tensor)
    return found


@pytest.mark.parametrize("word", WORDS)
def test_every_dtype_is_named_and_measured_as_safetensors_does(word: str, tmp_path: Path) -> None:
    tensor = noise(getattr(torch, word), 3, 5, 4)
    torch.save({"a": tensor}, tmp_path / "a.bin")
    check(tmp_path / "a.bin", {"a": tensor})
    safetensors.torch.save_file({"a": tensor}, tmp_path / "a.safetensors")
    (ours,), (theirs,) = read(tmp_path / "a.bin").plain().tensors, read_safetensors(tmp_path / "a.safetensors").tensors
    assert (ours.dtype, ours.shape, ours.size) == (theirs.dtype, theirs.shape, theirs.size)


def test_views_are_byte_ranges_or_strides(tmp_path: Path) -> None:
    whole = noise(torch.bfloat16, 6, 4, 3)
    views = {
        "whole": whole, "rows": whole[2:5], "row": whole[3], "one": whole[1, 2, 1], "flat": whole.view(-1)[7:29], "empty": whole[:0],
        "ones": whole[2:3].transpose(0, 1), "new": whole[1].unsqueeze(1),
        "columns": whole[:, 1:3], "last": whole[..., 2], "turned": whole.transpose(0, 2), "stepped": whole[::2],
        "spread": whole[0, 0].expand(5, 3),
    }  # fmt: skip
    torch.save(views, tmp_path / "a.pt")
    found = check(tmp_path / "a.pt", views)
    assert {view.name for view in found.strided} == {"columns", "last", "turned", "stepped", "spread"}
    assert {name for name, tensor in views.items() if tensor.is_contiguous()} == {tensor.name for tensor in found.header.tensors}
    with pytest.raises(PlanError, match="do not lie side by side"):
        read(tmp_path / "a.pt").plain()
    assert len({(tensor.start, tensor.size) for tensor in found.header.tensors if tensor.size}) == len(found.header.tensors) - 1
    assert found.tied == ()


def test_shared_storage_is_listed_under_every_name(tmp_path: Path) -> None:
    table, bias = noise(torch.float16, 7, 5), noise(torch.float32, 7)
    expected = {"embed": table, "head": table, "rows": table[:3], "bias": bias, "again": bias.view(7)}
    torch.save(expected, tmp_path / "a.bin")
    found = check(tmp_path / "a.bin", expected)
    assert found.tied == (("embed", "head"), ("bias", "again"))
    assert found.notes[0] == "a.bin: embed and head share their bytes and are written each"


def test_parameters_buffers_attributes_and_gradients(tmp_path: Path) -> None:
    marked = torch.nn.Parameter(noise(torch.float32, 3, 2))
    marked.tensor_model_parallel = True  # as Megatron does
    expected = {
        "parameter": torch.nn.Parameter(noise(torch.float32, 2, 3)),
        "frozen": torch.nn.Parameter(noise(torch.int8, 5), requires_grad=False),
        "buffer": torch.nn.Buffer(noise(torch.float64, 3)), "marked": marked, "number": torch.tensor(3.5), "none": torch.zeros(0, 4),
        "leaf": torch.ones(2, requires_grad=True),
    }  # fmt: skip
    torch.save(expected, tmp_path / "a.bin")
    found = check(tmp_path / "a.bin", {name: tensor.detach() for name, tensor in expected.items()})
    assert (found.unreadable, found.ignored, found.inside) == ({}, {}, "")


def test_a_real_module(tmp_path: Path) -> None:
    model = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert check(tmp_path / "a.pt", model.state_dict()).ignored == {}
    torch.save(model, tmp_path / "b.pt")
    with pytest.raises(PlanError, match=r"table of tensors(.|\n)*MultiheadAttention(.|\n)*state_dict"):
        read(tmp_path / "b.pt")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_cannot_be_had_is_named_with_its_reason(tmp_path: Path) -> None:
    odd = {
        "conj": noise(torch.complex64, 3).conj(), "imag": noise(torch.complex64, 3).conj().imag,
        "wide": torch.zeros(3, dtype=torch.complex128), "sparse": torch.eye(3).to_sparse(),
        "meta": torch.zeros(3, device="meta"), "small": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        "plain": torch.zeros(3), "storage": torch.zeros(3).untyped_storage(),
    }  # fmt: skip
    found = saved(odd, tmp_path / "a.pt")
    assert [tensor.name for tensor in found.header.tensors] == ["plain"]
    assert set(found.unreadable) == set(odd) - {"plain"}
    for name, word in {
        "conj": "conjugated",
        "imag": "negated",
        "wide": "ComplexDouble",
        "sparse": "_rebuild_sparse_tensor",
        "small": "qtensor",
    }.items():
        assert word in found.unreadable[name]
    with pytest.raises(PlanError, match="without running code"):
        read(tmp_path / "a.pt").plain()


# Tables


def test_the_models_table_is_taken_and_the_rest_named(tmp_path: Path) -> None:
    inner = OrderedDict(w=torch.zeros(2, 3), b=torch.ones(3))
    inner._metadata = OrderedDict(x={"version": 1})
    other = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    for key in ("state_dict", "model", "module", "model_state_dict"):
        torch.save({"epoch": 3, "optimizer": other, key: inner, "args": argparse.Namespace(lr=0.1), "note": "x"}, tmp_path / "a.pt")
        found = check(tmp_path / "a.pt", dict(inner))
        assert found.inside == key
        assert found.ignored == {
            "epoch": "an int",
            "optimizer": "a table of 2 with tensors",
            "args": "a value of argparse.Namespace",
            "note": "a str",
        }


def test_tables_in_tables_are_joined_with_dots(tmp_path: Path) -> None:
    layer = {"weight": torch.zeros(2, 3), "extra": [torch.ones(1), "text", torch.zeros(4)]}
    megatron = {"model": {"language_model": {"encoder": {"layers.0.qkv.weight": torch.ones(6, 2)}, "embedding": {}}}, "iteration": 7}
    torch.save(megatron, tmp_path / "a.pt")
    assert check(tmp_path / "a.pt", {"language_model.encoder.layers.0.qkv.weight": torch.ones(6, 2)}).ignored == {
        "iteration": "an int", "language_model.embedding": "a table of 0"}  # fmt: skip
    torch.save({"net": {7: layer}, "count": Counter("aab"), "more": defaultdict(list, a=1), "pair": (1, None)}, tmp_path / "b.pt")
    found = check(
        tmp_path / "b.pt", {"net.7.weight": layer["weight"], "net.7.extra.0": layer["extra"][0], "net.7.extra.2": layer["extra"][2]}
    )
    assert found.ignored == {"net.7.extra.1": "a str", "count": "a table of 2", "more": "a table of 1", "pair": "a list of 2"}


def test_objects_that_hold_tensors_are_not_passed_over(tmp_path: Path) -> None:
    found = saved({"w": torch.zeros(2), "ema": argparse.Namespace(shadow={"w": torch.ones(2)}), (1, 2): torch.ones(1)}, tmp_path / "a.pt")
    assert found.unreadable == {
        "ema": "a value of argparse.Namespace with tensors",
        "a list of 2": "a value of torch._utils._rebuild_tensor_v2",
    }


def test_names_that_clash_or_cannot_be_printed(tmp_path: Path) -> None:
    torch.save({"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="two tensors have one name"):
        read(tmp_path / "a.pt")
    torch.save({"a\x1b[31m": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="cannot be printed") as error:
        read(tmp_path / "a.pt")
    assert "\x1b" not in str(error.value)


def test_a_value_that_holds_itself(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"w": torch.zeros(1)}
    loop["self"] = loop
    torch.save(loop, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="nested too deeply"):
        read(tmp_path / "a.pt")
    plain: list[Any] = []
    plain.append(plain)
    assert saved({"w": torch.zeros(1), "x": plain}, tmp_path / "b.pt").ignored == {"x": "a list of 1"}


@pytest.mark.parametrize("value", [torch.zeros(2), [torch.zeros(2)], 3, None], ids=["tensor", "list", "number", "nothing"])
def test_no_table(value: object, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not hold a table of tensors"):
        saved(value, tmp_path / "a.pt")


# The file around them


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    value = {
        "w": torch.nn.Parameter(noise(torch.float32, 3, 4)), "u": noise(torch.uint16, 5), "long": 1 << 100, "low": -70000, "set": {1, 2},
        "frozen": frozenset({3}), "bytes": b"x" * 300, "array": bytearray(b"y"), "text": "\N{SNOWMAN}" * 200, "float": 0.5,
        "n": np.float64(2),
    }  # fmt: skip
    torch.save(value, tmp_path / "a.pt", pickle_protocol=protocol)
    found = check(tmp_path / "a.pt", {"w": value["w"].detach(), "u": value["u"]})
    assert set(found.ignored) == set(value) - {"w", "u"}


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], pack: int = zipfile.ZIP_STORED) -> None:
    """The same archive, written by zipfile, records changed or left out."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w", pack) as new:
        for info in old.infolist():
            data = change(info.filename.split("/", 1)[1], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)


def test_old_and_new_names_of_the_archive(tmp_path: Path) -> None:
    value = {"w": noise(torch.float16, 5, 3)}
    torch.save(value, tmp_path / "pytorch_model.bin")
    assert zipfile.ZipFile(tmp_path / "pytorch_model.bin").namelist()[0] == "pytorch_model/data.pkl"
    check(tmp_path / "pytorch_model.bin", value)
    with (tmp_path / "a.bin").open("wb") as file:
        torch.save(value, file)
    assert zipfile.ZipFile(tmp_path / "a.bin").namelist()[0] == "archive/data.pkl"
    check(tmp_path / "a.bin", value)
    rewritten(tmp_path / "a.bin", lambda name, data: data if name in ("data.pkl", "version", "data/0") else None)
    assert len(zipfile.ZipFile(tmp_path / "a.bin").namelist()) == 3
    check(tmp_path / "a.bin", value)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_kinds_of_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(PlanError, match=r"before version 1\.6(.|\n)*torch\.save\(torch\.load"):
        read(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), path)
    with pytest.raises(PlanError, match="TorchScript"):
        read(path)
    for name, data, what in [("byteorder", b"big", "big-endian"), ("version", b"11", "a version that this program does not know")]:
        torch.save({"w": torch.zeros(2)}, path)
        rewritten(path, lambda at, old, name=name, data=data: data if at == name else old)
        with pytest.raises(PlanError, match=what):
            read(path)
    rewritten(path, lambda at, old: old, zipfile.ZIP_DEFLATED)
    with pytest.raises(PlanError, match="compressed"):
        read(path)


def test_a_missing_or_short_storage(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for change, what in [(lambda at, old: None if at == "data/0" else old, "not in the archive"),
                         (lambda at, old: old[:-4] if at == "data/0" else old, "another size")]:  # fmt: skip
        torch.save({"w": torch.zeros(5)}, path)
        rewritten(path, change)
        with pytest.raises(FormatError, match=what):
            read(path)


def test_archives_with_64_bit_sizes(tmp_path: Path) -> None:
    torch.save({"w": noise(torch.float32, 9, 2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old:
        records = {info.filename.encode(): old.read(info) for info in old.infolist()}
    (tmp_path / "b.pt").write_bytes(archive(records, wide=True))
    with zipfile.ZipFile(tmp_path / "b.pt") as new:
        assert new.testzip() is None and {name.encode() for name in new.namelist()} == set(records)
    check(tmp_path / "b.pt", {"w": noise(torch.float32, 9, 2)})


def test_two_thousand_tensors_take_less_than_a_second(tmp_path: Path) -> None:
    torch.save({f"layers.{i}.attention.query_key_value.weight": torch.zeros(4, 4) for i in range(2000)}, tmp_path / "a.pt")
    begin = time.process_time()
    assert len(read(tmp_path / "a.pt").plain().tensors) == 2000
    assert time.process_time() - begin < 1


# At random


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of all dtypes and views of them, in tables of tables, some under two names."""
    out: dict[str, torch.Tensor] = {}
    for i in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        tensor = noise(
            getattr(torch, draw(st.sampled_from(["float32", "bfloat16", "int64", "bool", "float8_e5m2", "uint16"]))), *shape, seed=i
        )
        for _ in range(draw(st.integers(0, 3))):
            if not tensor.dim():
                break
            axis = draw(st.integers(0, tensor.dim() - 1))
            match draw(st.integers(0, 3)):
                case 0:
                    tensor = tensor.transpose(axis, draw(st.integers(0, tensor.dim() - 1)))
                case 1:
                    first = draw(st.integers(0, tensor.shape[axis]))
                    tensor = tensor.narrow(axis, first, draw(st.integers(0, tensor.shape[axis] - first)))
                case 2:
                    tensor = tensor.unsqueeze(axis)
                case 3 if tensor.shape[axis]:
                    tensor = tensor.select(axis, draw(st.integers(0, tensor.shape[axis] - 1)))
        out[f"t{i}"] = tensor
        if draw(st.booleans()):
            out[f"t{i}.twin"] = tensor
    return out


@settings(max_examples=40)
@given(state_dicts(), st.sampled_from([2, 4]))
def test_random_files_equal_torch(expected: dict[str, torch.Tensor], protocol: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        torch.save(expected, path, pickle_protocol=protocol)
        check(path, torch.load(path, weights_only=False))


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "a.pt")
    for wrong in (torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2).t().contiguous(), torch.arange(6).view(2, 3)):
        with pytest.raises(AssertionError):
            check(tmp_path / "a.pt", {"w": wrong})


def test_a_pickle_is_data() -> None:
    value = {"a": [1, 2.5, None, True, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], "b": "x"}
    assert load(pickle.dumps(value, 2), "f", 1000) == ["a", value["a"], "b", "x"]
    with pytest.raises(FormatError, match="too long"):
        load(pickle.dumps(list(range(100)), 2), "f", 50)


@pytest.mark.parametrize(("mark", "at", "says"), [(b"PK\1\2", 20, "a stored record has two sizes"), (b"PK\5\6", 20, "has a comment")])
def test_an_archive_that_says_two_things(tmp_path: Path, mark: bytes, at: int, says: str) -> None:
    content = bytearray(crafted.torch_file(crafted.table(w=crafted.tensor())))
    content[content.rindex(mark) + at] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(FormatError, match=says):
        read(tmp_path / "a.bin")
