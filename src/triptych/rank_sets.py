"""Where the ranks of others lie: one folder for each, or vLLM's files of one folder.

SRC/{rank0, rank1, ...}/model.safetensors        the model's own names; also tp_1 and the like
SRC/mp_rank_{rank:02}/model_optim_rng.pt         Megatron-LM, its arguments inside (d98e8a64:megatron/training/checkpointing.py:240-270)
SRC/model-rank-{rank}-part-{part}.safetensors    vLLM (vllm==0.33.0:vllm/model_executor/model_loader/sharded_state_loader.py:38-39, 269-305)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import formats
from .errors import FormatError, PlanError
from .formats import Header, Other, Stored, read_header
from .pieces import WEIGHTS, listed

VLLM = re.compile(r"model-rank-([0-9]{1,5})-part-([0-9]{1,5})\.safetensors")
STAGES = re.compile(r"model-pp-[0-9]+-tp-[0-9]+-part-[0-9]+\.safetensors|(?:.*[-_])?mp_rank_[0-9]+_[0-9]+")
FOLDER = re.compile(r"(?:[A-Za-z]+[-_.])*(?:rank|tp)[-_.]?([0-9]{1,5})(?:-of-[0-9]{1,5})?")
MODEL, TRAINED = "model.safetensors", "model_optim_rng.pt"


@dataclass(frozen=True)
class Found:
    """Ranks below a folder: what each holds, `homes`: where; `model`: rank 0 with the files that one checkpoint would have.

    `beside`: files above the folders; `engine`: whether vLLM wrote them, with names and order of its own.
    """

    path: Path
    stored: tuple[Stored, ...]
    homes: tuple[str, ...]
    model: Stored
    beside: tuple[Other, ...]
    engine: bool


def find(path: Path) -> Found | None:
    """The ranks that others wrote to a folder, or None: there are none, or the folder has weights of its own.

    Raises FormatError where ranks are missing or hold other tensors than the first, PlanError for several pipeline stages.
    """
    if not path.is_dir():
        return None
    names = sorted(entry.name for entry in path.iterdir())
    if stage := next((name for name in names if STAGES.fullmatch(name)), None):
        raise PlanError("the ranks are those of several pipeline stages", where=path, found=stage, expected="ranks that hold all layers")
    parts = [match for name in names if (match := VLLM.fullmatch(name))]
    folders = [match for name in names if (match := FOLDER.fullmatch(name)) and (path / name).is_dir()]
    if not parts and (not folders or any(name.endswith(WEIGHTS) for name in names)):
        return None
    numbers = sorted({int(match[1]) for match in parts}) or sorted(int(match[1]) for match in folders)
    if numbers != list(range(len(numbers))):
        raise FormatError("the ranks are not complete", where=str(path), expected=f"ranks 0 to {numbers[-1]}, each once",
                          found=listed(map(str, numbers), 6))  # fmt: skip
    homes = [match[0] for match in sorted(folders, key=lambda match: int(match[1]))]
    found = _files(path, parts, len(numbers)) if parts else _folders(path, homes)
    first = found.stored[0]
    for rank, stored in enumerate(found.stored):
        if differing := sorted(set(stored.tensors) ^ set(first.tensors)):
            raise FormatError("the ranks do not hold the same tensors", where=f"rank {rank}", tensor=differing[0],
                              expected=f"those of rank 0: {len(first.tensors)}", found=str(len(stored.tensors)))  # fmt: skip
    return found


def _files(path: Path, parts: Sequence[re.Match[str]], world: int) -> Found:
    """vLLM's files of one folder."""
    headers: list[list[Header]] = [[] for _ in range(world)]
    for match in sorted(parts, key=lambda match: (int(match[1]), int(match[2]))):
        headers[int(match[1])].append(read_header(path / match[0]))
    others = tuple(_others(path, {match[0] for match in parts}))
    stored = tuple(_stored(path, files, others) for files in headers)
    own = headers[0]
    names = [MODEL] if len(own) == 1 else [f"model-{number:05}-of-{len(own):05}.safetensors" for number in range(1, len(own) + 1)]
    renamed = {header.file: name for header, name in zip(own, names, strict=True)}
    files = tuple(replace(header, file=renamed[header.file]) for header in own)
    tensors = {name: tensor._replace(file=renamed[tensor.file]) for name, tensor in stored[0].tensors.items()}
    model = replace(stored[0], files=files, tensors=tensors, index=None if len(own) == 1 else f"{MODEL}.index.json")
    return Found(path, stored, ("",) * world, model, (), True)


def _stored(path: Path, files: Sequence[Header], others: tuple[Other, ...]) -> Stored:
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    if len(tensors) != sum(len(file.tensors) for file in files):
        raise FormatError("a tensor lies in two files", where=listed(file.file for file in files))
    return Stored(path, path, tuple(files), None, {}, others, tensors)


def _others(path: Path, taken: set[str]) -> Iterator[Other]:
    """The other files of a folder itself."""
    for place in sorted(path.iterdir()):
        if place.name not in taken and place.is_file():
            info = place.stat()
            yield Other(place.name, info.st_size, info.st_mtime_ns)


def _folders(path: Path, names: Sequence[str]) -> Found:
    """One folder for each rank; files of the model may lie above them."""
    stored = tuple(formats.read(path / name / TRAINED if (path / name / TRAINED).exists() else path / name) for name in names)
    beside = tuple(_others(path, set()))
    first = stored[0]
    model = (
        first
        if (first.root / "config.json").exists()
        else replace(first, path=path, root=path, settings=_settings(path, first, len(names)))
    )
    if len(first.files) == 1:
        (file,) = first.files
        model = replace(model, files=(replace(file, file=MODEL),),
                        tensors={name: tensor._replace(file=MODEL) for name, tensor in first.tensors.items()})  # fmt: skip
    return Found(path, stored, tuple(f"{name}/" for name in names), model, beside, False)


def _settings(path: Path, first: Stored, world: int) -> dict[str, Any] | None:
    """What Megatron's own arguments say, as a config of its family; None where there are none, or a config.json above the ranks."""
    if (path / "config.json").exists() or len(first.files) != 1 or not first.files[0].file.endswith(".pt"):
        return None
    told = formats.settings(first.root / first.files[0].file)
    if "num_attention_heads" not in told:
        return None
    for axis, found in (("tensor_model_parallel_size", world), ("pipeline_model_parallel_size", 1)):
        if told.get(axis, found) != found:
            raise FormatError("the ranks are not complete", where=str(path), expected=f"{axis}={told[axis]}", found=str(found))
    version = told.get("checkpoint_version")
    core = any("linear_qkv" in name for name in first.tensors)
    kind = "core" if core else f"v{min(2, int(version))}" if isinstance(version, int | float) and version >= 0 else "v0"
    told.pop("vocab_size", None)  # rows that fill the vocabulary up hold anything there, and are kept
    if told.get("group_query_attention") is False:
        told.pop("num_query_groups", None)  # a default that nothing reads
    return {**told, "model_type": f"megatron-{kind}"}
