"""Show the code: a sized layout as the plain PyTorch lines a person would write. Text only; torch is not imported.

    read_lines(layout, sizes)      ('q, k, v = qkv.view(b, s, 4, 3, 32).unbind(-2)',)        every part, [..., heads, dims]
    part_line(layout, sizes, "q")  'weight.view(4, 3, 32, -1)[:, 0].reshape(128, -1)'        one part, [heads * dims, ...]
    convert_lines(a, b, sizes)     ('weight = weight.view(4, 3, 32, -1).transpose(0, 1).reshape(384, -1)',)
    variables(layout)              {'q': 'q', 'k.rot': 'k_rot'}: the variables that read_lines assigns

The lines use the names `torch`, the source tensor and the batch axes, and nothing else.
Demo: python -m triptych.render_code
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from . import rowmap
from .errors import LayoutError
from .layout import Layout, count
from .render_ops import (
    Dim,
    Frame,
    Place,
    Slot,
    arranged,
    at_sum,
    by_axis,
    first_sum,
    frame_of,
    heads_dims,
    is_one_part,
    long,
    nested,
    reshaped,
    runs_of,
)
from .render_select import selections
from .sizes import Sizes, bind

WIDTH = 88
"""A line longer than this is cut into statements where that is possible."""


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A part that was taken out: its variable and what the axes of that tensor hold."""

    var: str
    part: rowmap.Part
    dims: tuple[Dim, ...]


def read_lines(
    layout: Layout, sizes: Sizes, source: str = "qkv", batch: Sequence[str] | None = ("b", "s"), axis: int = -1
) -> tuple[str, ...]:
    """Statements that read every part of `source` as [..., heads, dims] into `variables(layout, batch)`, or `variables(layout)` for axis 0.

    Args: batch: the axes before the packed one as written in a view; None for any number of them.
        axis: -1 for an activation (or, with batch=(), a bias); 0 for a weight, which gives [heads, dims, in].
    The results are views where one `view` and a split can give them; `flatten` and `reshape` copy where it cannot.

    >>> from .sizes import bind
    >>> layout = Layout("g (q r|k|v) d")
    >>> print(*read_lines(layout, bind(layout, h=32, g=8, d=128)), sep="\\n")
    q, k, v = qkv.view(b, s, 8, 6, 128).split([4, 1, 1], dim=-2)
    q, k, v = (x.flatten(-3, -2) for x in (q, k, v))
    """
    frame = frame_of(axis) if axis == 0 else Frame(None if batch is None else tuple(batch), ())
    names = variables(layout, frame.before or ())
    reader = _Apart(layout, sizes, frame, names, arrange=True)
    leaves = reader.leaves(source)
    lines = [*reader.lines, *_statements([(leaf.var, arranged(leaf.dims, heads_dims(leaf.part), frame)) for leaf in leaves])]
    if not reader.lines:
        leaf = leaves[0]
        leaves = [replace(leaf, var=names[leaf.part.path.names[0]])]
        lines = [f"{leaves[0].var} = {source}{arranged(leaf.dims, heads_dims(leaf.part), frame, raw=True)}"]
    return (*lines, *_aliases(leaves, names))


def variables(layout: Layout, reserved: Sequence[str] = ()) -> dict[str, str]:
    """Part name -> variable, in row order: dots become `_`, a keyword or a reserved name gets one more.

    >>> variables(Layout("h (q (rot c p|pass n)|in d)"))
    {'q.rot': 'q_rot', 'q.pass': 'q_pass', 'in': 'in_'}
    """
    taken = {*reserved, *keyword.kwlist, "torch", "_"}
    names: dict[str, str] = {}
    for name in (name for path in layout.paths for name in path.names):
        names[name] = _free(name.replace(".", "_") or "rows", taken)
        taken.add(names[name])
    return names


def part_line(layout: Layout, sizes: Sizes, part: str, source: str = "weight", axis: int = 0, bias: bool = False) -> str:
    """The expression that takes one part out of a weight as [heads * dims, in], in the order of its heads and dims.

    Args: axis: 0 for [out, in], -1 for a weight stored as [in, out]. bias: `source` has the packed axis only.
    Raises LayoutError for a part that the layout does not have.

    >>> from .sizes import bind
    >>> neox = Layout("h (q|k|v) d")
    >>> part_line(neox, bind(neox, h=4, d=32), "k", "bias", bias=True)
    'bias.view(4, 3, 32)[:, 1].reshape(-1)'
    >>> gpt2 = Layout("(q|k|v) h d")
    >>> part_line(gpt2, bind(gpt2, h=4, d=32), "k")
    'weight[128:256]'
    """
    if part not in layout.parts:
        raise LayoutError(f"no part {part!r}", layout=str(layout), expected=", ".join(layout.parts))
    frame = frame_of(axis, bias)
    found = selections(layout, sizes, source, frame, _places(layout, sizes))
    owner, one = next(pair for pair in zip(rowmap.parts(layout, sizes), found, strict=True) if part in pair[0].path.names)
    digits = by_axis(owner)
    have = [tuple(digits[str(axis)] for axis in slot) for slot in one.slots]
    return one.text + arranged(have, [sum(heads_dims(owner), ())], frame, one.raw)


def convert_lines(a: Layout, b: Layout, sizes: Sizes, source: str = "weight", axis: int = 0, bias: bool = False) -> tuple[str, ...]:
    """Statements that turn `source`, packed as `a`, into the same rows packed as `b`; none when nothing moves.

    One view and permute where that is enough, a cat of parts otherwise. Raises IncompatibleError as `rowmap.between`.

    >>> from .sizes import bind
    >>> a, b = Layout("(q h|k g|v g) d"), Layout("g (q r|k|v) d")
    >>> print(*convert_lines(a, b, bind(a, b, h=6, g=2, d=5), "bias", bias=True), sep="\\n")
    q, k, v = bias.split([30, 10, 10])
    bias = torch.cat([q.view(2, 15), k.view(2, 5), v.view(2, 5)], dim=1).reshape(-1)
    """
    rows = rowmap.between(a, b, sizes)
    frame = frame_of(axis, bias)
    if rows.is_identity:
        return ()
    if nest := nested(rows, frame):
        return (f"{source} = {source}{nest}",)
    names = variables(a, [source])
    unused = {name for path in a.paths if path.zero for name in path.names}
    reader = _Apart(a, sizes, frame, {name: "_" if name in unused else var for name, var in names.items()}, arrange=False)
    leaves: dict[str, _Leaf] = {}
    for leaf in reader.leaves(source):
        for alias in leaf.part.path.names:
            leaves[alias] = replace(leaf, var=names[alias]) if reader.lines else leaf
    joined = _Join(b, sizes, frame, source, leaves, names.values())
    lines = [*reader.lines, *(_aliases(leaves.values(), names) if reader.lines else [])]
    line = f"{source} = {joined.inline}"
    if len(line) <= WIDTH or not reader.lines:
        return (*lines, line)
    return (*lines, *_statements(joined.moves), *joined.steps, f"{source} = {joined.text}")


# -- taking apart ----------------------------------------------------------------------------------------------------


class _Apart:
    """Splits a tensor sum by sum, collecting `lines`.

    With `arrange`, what all parts need alike behind a split is done before it; without, leading sums are cut as they lie.
    """

    def __init__(self, layout: Layout, sizes: Sizes, frame: Frame, names: dict[str, str], arrange: bool) -> None:
        self.sizes, self.frame, self.names, self.arrange = sizes, frame, names, arrange
        self.layout, self.parts = layout, iter(rowmap.parts(layout, sizes))
        self.places = _places(layout, sizes)
        self.lines: list[str] = []
        self.taken = {*names.values(), *(frame.before or ()), *keyword.kwlist}
        self.headless = arrange and all(part.shape[0] == 1 for part in rowmap.parts(layout, sizes))

    def leaves(self, source: str) -> list[_Leaf]:
        return self._split(source, [self.layout.factors], True, ())

    def _split(self, var: str, slots: list[Slot], raw: bool, label: tuple[str, ...]) -> list[_Leaf]:
        at = first_sum(slots)
        if at is None:
            part = next(self.parts)
            digits = by_axis(part)
            return [_Leaf(var, part, tuple(tuple(digits[str(axis)] for axis in slot) for slot in slots))]
        lead, branches, rest = at_sum(slots[at])
        if len(branches) == 1:
            inline = (*lead, *branches[0].factors, *rest)
            return self._split(var, [*slots[:at], inline, *slots[at + 1 :]], raw, label + branches[0].names[:1])
        before = [*([()] if raw and self.headless else []), *slots[:at], *self._runs(lead)]
        coarse = not self.arrange and not before
        tails = [(*branch.factors, *rest) if coarse else branch.factors for branch in branches]
        after = slots[at + 1 :] if coarse else [*self._runs(rest), *slots[at + 1 :]]
        counts = [count(tail, self.sizes) for tail in tails]
        even = len(set(counts)) == 1
        inner = [self._runs(tail) for tail in tails]
        if not even or coarse or len({tuple(self._sizes(slots)) for slots in inner}) > 1:
            inner = [[tail] for tail in tails]
        middle = [sum(counts)] if coarse or not even else [len(branches), *self._sizes(inner[0])]
        text = var + reshaped(self._sizes(slots), [*self._sizes(before), *middle, *self._sizes(after)], self.frame, raw)
        place = len(self.lines)
        self.lines.append("")
        results, variables = [], []
        for branch, slots_in in zip(branches, inner, strict=True):
            child = [*before, *slots_in, *after]
            name = "" if all(map(is_one_part, child)) else self._between(label + branch.names[:1])
            found = self._split(name, child, False, label + branch.names[:1])
            if not name:
                name = self.names[found[0].part.path.names[0]]
                found = [replace(found[0], var=name)]
            variables.append(name)
            results += found
        kept = len(before) + (0 if even and not coarse else 1)
        right = len(middle) - 1 + len(after)
        if self.arrange and len(results) == len(branches):
            hoisted = self._hoisted(results, kept)
            if hoisted:
                text += hoisted
                results = [replace(leaf, dims=heads_dims(leaf.part)) for leaf in results]
                right = 2 - kept
        dim = self.frame.at(len(before), len(before) + 1 + right)
        where = f", dim={dim}" if dim else ""
        if coarse:
            text += f".chunk({len(branches)}{where})" if even else f".split({counts}{where})"
        else:
            text += f".unbind({dim})" if even else f".split({counts}{where})"
        self.lines[place] = f"{', '.join(variables)} = {text}"
        return results

    def _hoisted(self, leaves: list[_Leaf], kept: int) -> str:
        """What every leaf needs alike to the right of the split, or nothing."""
        if self.frame.before == () or kept > 2:
            return ""
        texts = set()
        for leaf in leaves:
            have, want = [long(dim) for dim in leaf.dims], heads_dims(leaf.part)
            if have[:kept] != list(want[:kept]):
                return ""
            texts.add(arranged(have[kept:], want[kept:], Frame(None, ())))
        return texts.pop() if len(texts) == 1 else ""

    def _between(self, label: tuple[str, ...]) -> str:
        name = _free("_".join(label) or "packed", self.taken)
        self.taken.add(name)
        return name

    def _sizes(self, slots: Sequence[Slot]) -> list[int]:
        return [count(slot, self.sizes) for slot in slots]

    def _runs(self, factors: Slot) -> list[Slot]:
        return runs_of(factors, self.places, self.sizes)


# -- joining ---------------------------------------------------------------------------------------------------------


class _Join:
    """Packs `leaves` as a layout: as the one expression `inline`, or as `moves` of the variables, `steps` and `text`."""

    def __init__(self, layout: Layout, sizes: Sizes, frame: Frame, source: str, leaves: dict[str, _Leaf], taken: Iterable[str]) -> None:
        self.sizes, self.frame, self.source, self.leaves = sizes, frame, source, leaves
        self.parts, self.taken = iter(rowmap.parts(layout, sizes)), {*taken, *keyword.kwlist, "torch", source}
        self.moves: list[tuple[str, str]] = []
        self.steps: list[str] = []
        self.inline, self.text = self._product(layout.factors, (), False, None)

    def _product(self, factors: Slot, above: Slot, thin: bool, name: str | None) -> tuple[str, str]:
        """A tensor with the axes `_kept`, as (one expression, what is left of it after the moves and steps); no name at the top."""
        lead, branches, rest = at_sum(factors)
        if not branches:
            return self._part(above, factors, thin)
        names = ["_".join(filter(None, [name, *branch.names[:1]])) for branch in branches]
        if len(branches) == 1:
            return self._product((*lead, *branches[0].factors, *rest), above, thin, names[0])
        inner, first = (*above, *lead), len(self.moves)
        outer = [count(inner, self.sizes)] if count(inner, self.sizes) > 1 else []
        sizes = [count((*branch.factors, *rest), self.sizes) for branch in branches]
        stacked = set(sizes) == {1} and bool(outer)
        items = [self._product((*b.factors, *rest), inner, stacked, n) for b, n in zip(branches, names, strict=True)]
        moves, dim = self.moves[first:], self.frame.at(len(outer), len(outer) + 1)
        call = "torch.stack" if stacked else "torch.cat"
        end = (f", dim={dim})" if dim else ")") + reshaped([*outer, sum(sizes)], self._sizes(self._kept(above, factors, thin)), self.frame)
        loop = _comprehension(moves) if len(moves) == len(items) > 2 else ""
        listed = f"[{', '.join(item for item, _ in items)}]"
        inline = f"{call}({loop or listed}{end}"
        text = f"{call}([{', '.join(text for _, text in items)}]{end}"
        if name is not None:
            var = _free(name or "packed", self.taken)
            self.taken.add(var)
            self.steps.append(f"{var} = {text}")
            text = var
        return inline, text

    def _kept(self, above: Slot, factors: Slot, thin: bool) -> list[Slot]:
        """The axes of an item: `above` unless it has size 1, and the flat rest unless the items are to be stacked."""
        slots = [above] if count(above, self.sizes) > 1 else []
        return slots if thin and slots else [*slots, factors]

    def _part(self, above: Slot, factors: Slot, thin: bool) -> tuple[str, str]:
        part, slots = next(self.parts), self._kept(above, factors, thin)
        if part.path.zero:
            before, after = (
                [f"{self.source}.shape[{i}]"] * len(axes or ()) for i, axes in ((0, self.frame.before), (-1, self.frame.after))
            )
            zeros = f"{self.source}.new_zeros({', '.join([*before, *map(str, self._sizes(slots)), *after])})"
            return zeros, zeros
        leaf, digits = self.leaves[part.path.names[0]], by_axis(part)
        chain = arranged(leaf.dims, [tuple(digits[str(axis)] for axis in slot) for slot in slots], self.frame)
        self.moves.append((leaf.var, chain))
        return leaf.var + chain, leaf.var

    def _sizes(self, slots: Sequence[Slot]) -> list[int]:
        return [count(slot, self.sizes) for slot in slots]


# -- statements ------------------------------------------------------------------------------------------------------


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _places(layout: Layout, sizes: Sizes) -> list[dict[str, Place]]:
    return [by_axis(part) for part in rowmap.parts(layout, sizes)]


def _aliases(leaves: Iterable[_Leaf], names: dict[str, str]) -> list[str]:
    parts = dict.fromkeys(leaf.part for leaf in leaves)
    return [f"{names[alias]} = {names[part.path.names[0]]}" for part in parts for alias in part.path.names[1:]]


def _statements(moves: Sequence[tuple[str, str]]) -> list[str]:
    """`variable = variable.chain` for every move, those of one chain in one statement."""
    lines = []
    for chain in dict.fromkeys(chain for _, chain in moves if chain):
        group = [(var, chain) for var, other in moves if other == chain]
        left, listed = (", ".join(words) for words in ([var for var, _ in group], [var + chain for var, _ in group]))
        short = len(group) == 1 or (len(group) == 2 and len(left) + len(listed) + 3 <= WIDTH)
        lines.append(f"{left} = {listed if short else f'({_comprehension(group)[1:-1]})'}")
    return lines


def _comprehension(moves: Sequence[tuple[str, str]]) -> str:
    """`[x.chain for x in (q, k, v)]`, if all move alike."""
    if len({chain for _, chain in moves}) != 1 or not moves[0][1]:
        return ""
    names, chain = [var for var, _ in moves], moves[0][1]
    x = _free("x", {*names, *re.findall(r"\w+", chain)})
    return f"[{x}{chain} for {x} in ({', '.join(names)})]"


if __name__ == "__main__":
    for text in ("h (q|k|v) d", "(q|k|v) h d", "g (q r|k|v) d", "h (rot p c|pass u)"):
        demo = Layout(text)
        sized = bind(demo, **{axis: size for axis, size in {"h": 8, "g": 2, "d": 32, "p": 8, "u": 16}.items() if axis in (*demo.axes, "h")})
        print(f"# {demo} with {sized.of(demo)}", *read_lines(demo, sized), part_line(demo, sized, demo.parts[0]), sep="\n", end="\n\n")
