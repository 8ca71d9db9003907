"""Which tensor goes to which output file, and where in it: as the source has them, or in shards of a size."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from .checkpoint import Checkpoint
from .errors import FormatError, PlanError
from .formats import ALIGN, BITS, Header, Stored, index_bytes, open_file, safetensors_name
from .formats.folder import INDEX, SINGLE
from .moves import Move, stamp_of
from .packed import BY_STAMP
from .stamp import KEY, Stamped
from .steps import Feed, Nest, OutFile, Step


def files_of(checkpoint: Checkpoint, moves: Sequence[Move], shard: int | None = None) -> tuple[OutFile, ...]:
    """Every file with its steps, where the (first) source tensor stood; with `shard`, in files of at most so many bytes of tensors."""
    stored, stamps = checkpoint.stored, _stamps(checkpoint, moves)
    sources = list(_steps(stored, moves))
    if shard is None:
        return tuple(_same_head(stored.root / file.file, file, steps) if file.head else
                     placed_file(safetensors_name(file.file), steps, _metadata([file]), stamps) for file, steps in sources)  # fmt: skip
    if not stored.is_folder:
        raise PlanError("a file becomes a file", where=stored.path, try_="give its folder to write shards")
    if any(file.head for file, _ in sources):
        raise PlanError("GGUF files are not cut into shards here", where=stored.path, try_="gguf-split")
    metadata = _metadata([file for file, _ in sources])
    shards = list(_shards([step for _, steps in sources for step in steps], shard))
    names = [SINGLE[0]] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    return tuple(placed_file(name, steps, metadata, stamps) for name, steps in zip(names, shards, strict=True))


def index_of(stored: Stored, files: Sequence[OutFile], shard: int | None = None) -> tuple[str, bytes] | None:
    """Name and bytes of the index: where the source has one, or where shards were cut."""
    if (len(files) == 1) if shard else (stored.index is None):
        return None
    weight_map = {step.tensor: file.name for file in files for step in file.steps}
    name = SINGLE[0] + INDEX if shard or stored.index is None else safetensors_name(stored.index)
    return name, index_bytes(weight_map, sum(file.data_size for file in files), stored.index_metadata)


def bytes_of(text: str | int) -> int:
    """A size of a file as people write it: 5GB, 200MB, or a number of bytes.

    >>> bytes_of("5GB"), bytes_of("200 MB"), bytes_of("9B"), bytes_of(4096)
    (5000000000, 200000000, 9, 4096)
    """
    number = str(text).strip().upper()
    unit = next((unit for unit in ("KB", "MB", "GB", "TB", "B") if number.endswith(unit)), "")
    digits = number.removesuffix(unit).strip()
    if not digits.isascii() or not digits.isdecimal() or not 0 < len(digits) < 16 or not int(digits):
        raise PlanError("a size of a file is a number and a unit", found=repr(text), expected="5GB, 200MB, or a number of bytes")
    return int(digits) * {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]


def _steps(stored: Stored, moves: Sequence[Move]) -> Iterator[tuple[Header, list[Step]]]:
    """Every source file with the tensors that take the places of its own; files whose tensors all went elsewhere are left out."""
    taken = {piece.tensor for move in moves for piece in move.packed.pieces}
    written: dict[str, list[Step]] = {}
    for move in moves:  # a tensor that keeps its name keeps its place
        names = {piece.tensor for piece in move.packed.pieces}
        for step in move.steps:
            written.setdefault(step.tensor if step.tensor in names else move.packed.pieces[0].tensor, []).append(step)
    for file in stored.files:
        steps: list[Step] = []
        for name, dtype, shape, where, start, stop in file.tensors:
            if name in written:
                steps += written[name]
            elif name not in taken:
                size = stop - start
                feeds = (Feed(where, name, start, size, _all(size)),) if size else ()
                steps.append(Step(name, dtype, shape, 0, size, feeds))
        if steps or not file.tensors:
            yield file, steps


@lru_cache(maxsize=1024)
def _all(size: int) -> tuple[Nest, ...]:
    """All bytes of a tensor; one value for all tensors of one size."""
    return (Nest(0, 0, size),)


def _shards(steps: Sequence[Step], most: int) -> Iterator[list[Step]]:
    """Tensors in order, a new file wherever the next one would make the last too large."""
    some: list[Step] = []
    size = 0
    for step in steps:
        if some and size + step.size > most:
            yield some
            some, size = [], 0
        some.append(step)
        size += step.size
    yield some


def _stamps(checkpoint: Checkpoint, moves: Sequence[Move]) -> dict[str, Stamped]:
    """What the stamps will say: of what is moved, and of what stays and had one."""
    taken = {piece.tensor for move in moves for piece in move.packed.pieces}
    stamps = {piece.tensor: stamp_of(move.after, piece, move.pieces, move.sizes) for move in moves for piece in move.pieces}
    for packed in checkpoint.projections:
        if packed.source == BY_STAMP and packed.pieces[0].tensor not in taken:
            stamps |= {piece.tensor: stamp_of(packed, piece, packed.pieces, packed.sizes) for piece in packed.pieces}
    return stamps


def _metadata(files: Sequence[Header]) -> dict[str, str]:
    """What the headers say beside their tensors; the first file's word where they differ."""
    return {key: value for file in reversed(files) for key, value in file.metadata.items() if key != KEY}


def placed_file(name: str, steps: list[Step], metadata: dict[str, str], stamps: dict[str, Stamped]) -> OutFile:
    """A file with its steps placed: whole pages first, so that large tensors begin on a page."""
    steps.sort(key=lambda step: (step.size % ALIGN != 0, -BITS[step.dtype]))
    starts = itertools.accumulate((step.size for step in steps), initial=0)
    pairs = zip(steps, starts, strict=False)
    placed = tuple([Step(name, dtype, shape, at, size, feeds, zeros) for (name, dtype, shape, _, size, feeds, zeros), at in pairs])
    layouts = tuple((step.tensor, stamps[step.tensor]) for step in placed if step.tensor in stamps)
    return OutFile(name, placed, tuple(metadata.items()), layouts)


def _same_head(path: Path, file: Header, steps: Sequence[Step]) -> OutFile:
    """A GGUF file made from one with the same tensors: its head is copied, so each tensor keeps its name, shape and place."""
    made = {step.tensor: step for step in steps}
    for old in file.tensors:
        if old.name not in made or made[old.name][1:3] != old[1:3]:
            raise PlanError("a GGUF file keeps its tensors: rows can move in each, not between them", tensor=old.name, file=file.file,
                            try_="a target of the same tensors, such as another layout of a fused one, or --rope")  # fmt: skip
    fd = open_file(path)
    try:
        head = os.pread(fd, file.head, 0)
    finally:
        os.close(fd)
    if len(head) < file.head:
        raise FormatError("the file was cut short while it was read", file=file.file)
    placed = tuple(made[old.name]._replace(start=old.start - file.head) for old in file.tensors)
    return OutFile(file.file, placed, (), (), head, file.align)
