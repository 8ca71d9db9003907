"""The files that vLLM's save_sharded_state writes for the checkpoint of small_gqa.py, without vLLM (docs/sharding.md).

python examples/vllm_ranks.py SOURCE FOLDER

q, k and v of a rank in one tensor, gate and up in another, the vocabulary padded to a multiple of 64; two ranks hold the same kv head.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

KV_HEADS, RANKS = 2, 4


def main(source: Path, folder: Path) -> None:
    whole = load_file(source / "model.safetensors")
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    for rank in range(RANKS):
        save_file(dict(tensors(whole, rank)), folder / f"model-rank-{rank}-part-0.safetensors")


def tensors(whole: dict[str, NDArray[np.float16]], rank: int) -> list[tuple[str, NDArray[np.float16]]]:
    def column(name: str) -> NDArray[np.float16]:
        return np.split(whole[name], RANKS)[rank]

    def kv(name: str) -> NDArray[np.float16]:
        return np.split(whole[name], KV_HEADS)[rank * KV_HEADS // RANKS]

    out = []
    for name, tensor in whole.items():
        if "norm" in name:
            out.append((name, tensor))
        elif "embed" in name or "lm_head" in name:
            padded = np.concatenate([tensor, np.zeros((-len(tensor) % 64, tensor.shape[1]), tensor.dtype)])
            out.append((name, np.split(padded, RANKS)[rank]))
        elif "o_proj" in name or "down_proj" in name:
            out.append((name, np.ascontiguousarray(np.split(tensor, RANKS, axis=1)[rank])))
        elif "q_proj" in name:
            rows = [column(name), kv(name.replace("q_", "k_")), kv(name.replace("q_", "v_"))]
            out.append((name.replace("q_proj", "qkv_proj"), np.concatenate(rows)))
        elif "gate_proj" in name:
            out.append((name.replace("gate_", "gate_up_"), np.concatenate([column(name), column(name.replace("gate_", "up_"))])))
    return out


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
