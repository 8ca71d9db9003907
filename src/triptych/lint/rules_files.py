"""Rules on files: what is there, what should be, what an index says, what a pickle asks for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations

from ..formats import MARKER
from ..pieces import in_bytes, listed
from .model import ERROR, WARNING, Spot, rule
from .pickles import is_for_tensors, runs_code
from .seen import NUMBERED, Seen

PART = re.compile(r"\..+\.triptych-parts?\Z", re.DOTALL)
STACKS = ("layers", "layer", "h", "blocks", "block")
STACK = re.compile(rf"((?:.*?\.)?(?:{'|'.join(STACKS)}))\.(\d{{1,9}})\.", re.DOTALL)
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@rule("unreadable-file", ERROR, "A file is damaged or cannot be read", "fetch the file again; if it stays so, ask who wrote it")
def unreadable_file(seen: Seen) -> Iterator[Spot]:
    """Headers, indexes, config.json; and tensors, where they were read."""
    yield from seen.unreadable
    if "values" in seen.__dict__:
        yield from seen.values.unreadable


@rule("missing-shard", ERROR, "A file of the checkpoint is missing", "fetch the missing file, or write the index anew")
def missing_shard(seen: Seen) -> Iterator[Spot]:
    """Files that an index names, or that numbered names promise."""
    for weights in seen.sets:
        counts = Counter(weights.listed.values())
        for file in weights.missing:
            if not seen.alone:
                said = (
                    f"{weights.index} names it for {counts[file]} tensors"
                    if weights.index
                    else "the numbers of the other shards promise it"
                )
                yield Spot(f"{said}, and it is not there", file)


@rule(
    "missing-index",
    ERROR,
    "Shards lie in the folder without an index",
    "write NAME.safetensors.index.json: most loaders find no shard without it",
)
def missing_index(seen: Seen) -> Iterator[Spot]:
    """Numbered shards that no index names."""
    for weights in seen.sets:
        if weights.index is None and not seen.alone and len(weights.headers) + len(weights.missing) + len(weights.damaged) > 1:
            yield Spot(f"{len(weights.headers)} shards and no index", weights.name)


@rule(
    "missing-tensor", ERROR, "The index names a tensor that its file does not have", "write the index anew from the headers of the shards"
)
def missing_tensor(seen: Seen) -> Iterator[Spot]:
    """Only of files that were read: a missing file is another finding."""
    for weights in seen.sets:
        there = {header.file: {tensor.name for tensor in header.tensors} for header in weights.headers}
        for name, file in weights.listed.items():
            if file in there and name not in there[file]:
                other = weights.tensors.get(name)
                yield Spot(
                    f"the index has it in {file}, and it is in {other.file if other else 'no file that was read'}", weights.index, name
                )


@rule(
    "unlisted-tensor",
    ERROR,
    "A tensor lies in a shard and the index does not name it",
    "write the index anew: loaders do not see this tensor",
)
def unlisted_tensor(seen: Seen) -> Iterator[Spot]:
    for weights in seen.sets:
        if weights.index:
            for name, tensor in weights.tensors.items():
                if name not in weights.listed:
                    yield Spot(f"{weights.index} does not name it", tensor.file, name)


@rule("stale-shard", WARNING, "A numbered shard that the index does not name", "remove it if it is left over from an earlier save")
def stale_shard(seen: Seen) -> Iterator[Spot]:
    stems: dict[tuple[str, str], str] = {}
    for weights in seen.sets:
        if weights.index:
            stems |= {(m["stem"], m["ending"]): weights.index for file in weights.listed.values() if (m := NUMBERED.match(file))}
    named = {file for weights in seen.sets for file in weights.listed.values()}
    for file in seen.files:
        match = NUMBERED.match(file)
        if match and file not in named and (match["stem"], match["ending"]) in stems:
            yield Spot(f"{stems[match['stem'], match['ending']]} does not name it", file)


@rule(
    "total-size", WARNING, "total_size of the index is not the bytes of the tensors", "write the sum of the tensors' bytes into the index"
)
def total_size(seen: Seen) -> Iterator[Spot]:
    """Only where every shard was read."""
    for weights in seen.sets:
        if weights.total is None or not weights.whole or not weights.index:
            continue
        size = sum(tensor.size for tensor in weights.tensors.values())
        if isinstance(weights.total, bool) or not isinstance(weights.total, (int, float)) or weights.total != size:
            yield Spot(f"it says {weights.total!r:.40}, and the tensors have {size} bytes ({in_bytes(size)})", weights.index)


@rule("double-tensor", ERROR, "Two shards hold a tensor of one name", "find out which of the two is meant and remove the other")
def double_tensor(seen: Seen) -> Iterator[Spot]:
    for weights in seen.sets:
        first: dict[str, str] = {}
        for header in weights.headers:
            for tensor in header.tensors:
                if (other := first.setdefault(tensor.name, tensor.file)) != tensor.file:
                    yield Spot(f"it lies in {other} and in {tensor.file}", tensor.file, tensor.name)


@rule(
    "two-weight-sets",
    WARNING,
    "Two sets of weights in one folder",
    "keep one of them, or say which one is meant wherever the folder is loaded",
)
def two_weight_sets(seen: Seen) -> Iterator[Spot]:
    """Sets that share names of tensors: two files, an index beside a single file, or two formats."""
    for one, other in combinations(seen.sets, 2):
        if both := [name for name in one.tensors if name in other.tensors]:
            yield Spot(f"{len(both)} tensors are in {other.name} too, such as {listed(both, 1).removesuffix(', ...')}", one.name)


@rule(
    "missing-layer", ERROR, "A layer is missing among the others", "fetch or write the missing layer; fewer layers need another config.json"
)
def missing_layer(seen: Seen) -> Iterator[Spot]:
    """A gap in the numbers of `layers.N.` and its like, or fewer of them than config.json says."""
    for weights in seen.sets:
        stacks: dict[str, set[int]] = {}
        for name in weights.tensors if weights.whole and not seen.alone else ():
            if match := STACK.match(name):
                stacks.setdefault(match[1], set()).add(int(match[2]))
        for stack, numbers in stacks.items():
            if gaps := [str(i) for i in range(min(numbers), min(max(numbers), min(numbers) + 10_000)) if i not in numbers]:
                yield Spot(f"{stack} has {len(numbers)} layers up to {max(numbers)}, and none of number {listed(gaps, 6)}", weights.name)
        count = next((n for key in COUNTS if type(n := (seen.config or {}).get(key)) is int), 0)
        if stacks and (most := max(map(len, stacks.values()))) < count and max(max(numbers) for numbers in stacks.values()) + 1 == most:
            yield Spot(f"config.json says {count} layers, and the files have {most}", weights.name)


@rule("unfinished", ERROR, "A conversion was killed and left its marks", "run the same conversion again: it goes on; or remove the folder")
def unfinished(seen: Seen) -> Iterator[Spot]:
    for file in seen.files:
        name = file.rpartition("/")[2]
        if name == MARKER:
            yield Spot("the marker of an unfinished conversion: the folder is not complete", file)
        elif PART.match(name):
            yield Spot("a half-written file of a conversion", file)


@rule(
    "unprintable-name",
    ERROR,
    "A name has characters that cannot be printed",
    "rename it: such names hide in listings and can drive a terminal",
)
def unprintable_name(seen: Seen) -> Iterator[Spot]:
    for file in seen.files:
        if not file.isprintable():
            yield Spot("the name of the file has control characters", file)
    for weights in seen.sets:
        for name, tensor in weights.tensors.items():
            if not name.isprintable():
                yield Spot("the name of the tensor has control characters", tensor.file, name)


@rule(
    "unsafe-pickle",
    ERROR,
    "A pickle asks for functions that run code",
    "do not load this file; take a safetensors file of the same weights",
)
def unsafe_pickle(seen: Seen) -> Iterator[Spot]:
    """Nothing is loaded: the names are read off the instructions."""
    for file, names in seen.asked:
        if bad := [name for name in names if runs_code(name)]:
            yield Spot(f"it asks for {listed(bad, 8)}; nothing of it was run", file)


@rule(
    "pickle-objects",
    WARNING,
    "A pickle holds more than tensors",
    "save tensors alone, as safetensors; torch.load(weights_only=True) refuses this file",
)
def pickle_objects(seen: Seen) -> Iterator[Spot]:
    for file, names in seen.asked:
        if more := [name for name in names if not is_for_tensors(name) and not runs_code(name)]:
            yield Spot(f"it asks for {listed(more, 8)}", file)


RULES = (
    unreadable_file, missing_shard, missing_index, missing_tensor, unlisted_tensor, stale_shard, double_tensor, total_size, two_weight_sets,
    missing_layer, unfinished, unprintable_name, unsafe_pickle, pickle_objects,
)  # fmt: skip
