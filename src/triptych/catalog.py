"""The layouts in use, as data, in the order in which a person would guess; and which of them fit given rows and sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from . import axes
from .errors import SizeError
from .layout import Layout, count
from .rowmap import Digit, parts
from .sizes import Sizes, bind


class Entry(NamedTuple):
    """A layout and who uses it; `who` is empty for one that is only a likely mistake or variation."""

    layout: Layout
    who: str


class Candidate(NamedTuple):
    """A layout that fits, with sizes for all its axes."""

    layout: Layout
    sizes: Sizes
    who: str


USUAL = (
    ("(q|k|v) h d", "GPT-2, MPT, ViT, nn.MultiheadAttention"),
    ("h (q|k|v) d", "GPT-NeoX, BLOOM, Persimmon, Megatron v2+"),
    ("(q h|k g|v g) d", "Phi-3, DBRX; with one kv head StarCoder, Falcon-7B"),
    ("g (q r|k|v) d", "Falcon-40B, InternLM2, Megatron core"),
    ("h d", "a projection of its own: LLaMA, BERT"),
    ("m (q|v|k) n d", "CodeGen, m = 4"),
    ("t (q|k|v) n d", "Megatron v0, one block per rank"),
    ("t (q n r|k n|v n) d", "MiMo-V2.5, GPT-NeoX with GQA, one block per rank"),
    ("h d (q|k|v)", "Megatron checkpoint version 1.0"),
    ("(k|v) g d", "JetMoE, Granite-Speech, cross-attention"),
    ("g (k|v) d", "Megatron linear_kv, ESMFold"),
    ("g d (k|v)", "Megatron v1 cross-attention"),
    ("(q|k) h d", "ConViT, TNT"),
    ("h (q|gate) d", "Qwen3-Next q_proj"),
    ("g (q r|gate r|k|v) d", "Megatron with an output gate"),
    ("_ g (q r|k|v) d|gate h", "Megatron-Bridge, Step-3.5"),
    ("(gate|q|k|v) h d", "HRM-Text"),
    ("(q h|k g|v g|gate h) d", "Muse-Spark"),
    ("h (q dk|k dk|v dv)", "LeViT, TinyViT, EfficientFormer"),
    ("q h dk|k h dk|v h dv", "xLSTM, BoTNet, ONNX Attention"),
    ("q h dk|k g dk|v g dv", "PLaMo2"),
    ("h (k dn|v dv)", "DeepSeek kv_b_proj"),
    ("h (nope dn|rope dr)", "DeepSeek q_b_proj"),
    ("latent dl|rope dr", "DeepSeek kv_a_proj_with_mqa"),
    ("g (q dk|k dk|v r dv|z r dv)", "Qwen3-Next in_proj_qkvz"),
    ("q g dk|k g dk|v h dv", "Qwen3.5 in_proj_qkv"),
    ("g (b r|a r)", "Qwen3-Next in_proj_ba"),
    ("(gate|up) f", "Phi-3, GLM, Mixtral"),
    ("f (gate|up)", "gpt-oss"),
    ("(up|gate) f", "gte, molmo2, Phi-4 audio, Hunyuan"),
    ("f (up|gate)", ""),
    ("(x|z) f", "Mamba-1"),
    ("f (x|z)", "Zamba"),
    ("(B|C|x) f", "LFM2 short convolution"),
    ("h p c", "a projection of its own, rotary pairs side by side: Meta LLaMA, GPT-J"),
    ("r g d", "query heads tiled: PLaMo in GGUF"),
    ("(q r g|k g|v g) d", "query heads tiled: PLaMo in GGUF"),
    ("(q|k|v) d h", "nobody: heads scrambled"),
    ("(q d h|k d g|v d g)", "nobody: heads scrambled"),
    ("d h", "nobody: heads scrambled"),
    ("g d", "a projection of its own: k or v"),
    ("g p c", "a projection of its own, rotary pairs side by side: Meta LLaMA, GPT-J"),
    ("d g", "nobody: heads scrambled"),
    ("h (rot c p|pass n)", "a partly rotated projection: GPT-NeoX, Phi"),
    ("h (rot p c|pass n)", "a partly rotated projection, pairs side by side: GPT-J, CodeGen, GLM-4"),
    ("h (pass n|rot c p)", "a projection rotated at its end: DeepSeek"),
    ("h (pass n|rot p c)", "a projection rotated at its end, pairs side by side: DeepSeek"),
)
"""(layout, who), the most usual first."""

REORDERED = (
    "(q|k|v) h d",
    "h (q|k|v) d",
    "(q h|k g|v g) d",
    "g (q r|k|v) d",
    "t (q|k|v) n d",
    "t (q n r|k n|v n) d",
    "h d (q|k|v)",
    "(k|v) g d",
    "g (k|v) d",
)
"""These also with their parts in every other order."""

ROTATED = ("(q|k|v) h d", "h (q|k|v) d", "(q h|k g|v g) d", "g (q r|k|v) d", "t (q|k|v) n d", "t (q n r|k n|v n) d")
"""These also with rotary pairs side by side, in q and k or in all parts."""

HEAD_DIMS = (128, 64, 80, 96, 256, 32, 112, 72, 192, 48, 16)
KV_HEADS = (8, 4, 2, 1)
"""Guessed first, as far as they divide."""

ROTATED_SHARES = ((1, 2), (1, 4), (3, 4), (1, 8), (1, 3))
"""How much of a head is rotated, when not all of it."""


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """All layouts to consider, without sizes: the usual ones, then other part orders, then rotary orders.

    >>> entries()[1]
    Entry(layout=Layout('h (q|k|v) d'), who='GPT-NeoX, BLOOM, Persimmon, Megatron v2+')
    """
    texts = dict(USUAL)
    for text in REORDERED:
        for other in _part_orders(text):
            texts.setdefault(other, "")
    for text in ROTATED:
        texts.setdefault(_rotary(text, ("q", "k")), "rotary pairs side by side: GGUF, Meta")
        texts.setdefault(_rotary(text, ("q", "k", "v")), "")
    return tuple(Entry(Layout(text), who) for text, who in texts.items())


def _part_orders(text: str) -> Iterator[str]:
    before, inner, after = _bracket(text)
    for order in itertools.permutations(inner.split("|")):
        yield f"{before}({'|'.join(order)}){after}"


def _rotary(text: str, rotated: tuple[str, ...]) -> str:
    """`d` moved into every part, as `p c` in the rotated ones; `h (q|k|v) d` -> `h (q p c|k p c|v d)`."""
    if len(rotated) == 3:
        return text.removesuffix(" d") + " p c"
    before, inner, after = _bracket(text.removesuffix(" d"))
    branches = [branch + after + (" p c" if branch[0] in rotated else " d") for branch in inner.split("|")]
    return f"{before}({'|'.join(branches)})" if before else "|".join(branches)


def _bracket(text: str) -> tuple[str, str, str]:
    before, _, rest = text.partition("(")
    inner, _, after = rest.partition(")")
    return before, inner, after


def checked(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes under their chief names. Raises SizeError: an axis that no entry has, no positive whole number, a contradiction."""
    given = axes.checked(sizes, _all_axes())
    axes.resolve(given, list(given))
    return given


@lru_cache(maxsize=1)
def _all_axes() -> tuple[str, ...]:
    return tuple(dict.fromkeys(axis for layout, _ in entries() for axis in layout.axes))


def candidates(rows: int | None = None, **sizes: int) -> Iterator[Candidate]:
    """Every known layout that fits, the usual first; at one sizing no two that put every label on the same row.

    Unknown sizes are tried one by one, the usual first: with `rows`, any of h, g, d may be unknown; without, g and t only.
    A size that is given must mean something to the layout (`f` rules out attention, `d` rules out gate and up).

    >>> for layout, sizes, who in itertools.islice(candidates(6144, h=32, d=128), 2):
    ...     print(f"{str(layout):18} {sizes.of(layout):14} {who}")
    (q h|k g|v g) d    h=32 d=128 g=8 Phi-3, DBRX; with one kv head StarCoder, Falcon-7B
    g (q r|k|v) d      g=8 r=4 d=128  Falcon-40B, InternLM2, Megatron core

    Raises SizeError: an axis that no entry has, a size that is no positive whole number, sizes that contradict each other.
    """
    given = checked(sizes)
    seen: set[object] = set()
    for layout, who in entries():
        if not _speaks_of(layout, given):
            continue
        for sized in _fits(layout, rows, given):
            key = _placement(layout, sized)
            if key not in seen:
                seen.add(key)
                yield Candidate(layout, sized, who)


def _speaks_of(layout: Layout, given: Mapping[str, int]) -> bool:
    heads = any(path.heads for path in layout.paths)
    dims = any(axis in axes.DIM_ATOMS for axis in layout.axes)
    return all(heads if name in axes.ATOMS else dims if name in axes.DIM_ATOMS else name in layout.axes for name in given)


def _fits(layout: Layout, rows: int | None, sizes: Mapping[str, int]) -> Iterator[Sizes]:
    """Every sizing of the layout, unknown sizes guessed one at a time."""
    if layout.n_is_free and "d" in sizes and not {"n", "p"} & set(sizes):
        rest = {name: size for name, size in sizes.items() if name != "d"}
        for part, whole in ROTATED_SHARES:
            if sizes["d"] * part % (2 * whole) == 0:
                pairs = sizes["d"] * part // (2 * whole)
                yield from _fits(layout, rows, {**rest, "p": pairs, "n": sizes["d"] - 2 * pairs})
        return
    if {"q", "k"} <= set(layout.parts) and "r" not in layout.axes and not {"h", "g"} <= set(layout.axes):
        sizes = {"r": 1, **sizes}
    try:
        known = axes.resolve(sizes, layout.axes, layout.n_is_free)
    except SizeError:
        return
    missing = [name for name in dict.fromkeys(axes.ALIASES.get(axis, axis) for axis in layout.axes) if name not in known]
    if missing:
        name, values = _guess(layout, missing, known, rows)
        for value in values:
            yield from _fits(layout, rows, {**sizes, name: value})
    elif rows is None or count(layout.factors, known) == rows:
        yield bind(layout, rows=rows, **sizes)


def _guess(layout: Layout, missing: list[str], known: Mapping[str, int], rows: int | None) -> tuple[str, Iterable[int]]:
    """An axis to try, and its values. The last unknown follows from the rows, which grow by equal steps with it."""
    if rows is not None and len(missing) == 1 and not (missing == ["g"] and "h" in known):
        one, two = (count(layout.factors, {**known, missing[0]: value}) for value in (1, 2))
        value, rest = divmod(rows - one, two - one)
        return missing[0], [] if rest or value < 0 else [value + 1]
    if "d" in missing or "p" in missing:
        return "d", _divisors(rows, HEAD_DIMS)
    if "g" not in known and {"g", "r", "t"} & set(missing):
        return "g", _divisors(known["h"], (known["h"], *KV_HEADS)) if "h" in known else _divisors(rows, KV_HEADS)
    if "t" in missing and "g" in known:
        return "t", _divisors(known["g"])[1:-1]
    return missing[0], []


def _divisors(number: int | None, first: tuple[int, ...] = ()) -> list[int]:
    """All divisors, ascending except for those to come first."""
    if number is None:
        return []
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    found = {*small, *(number // i for i in small)}
    return [*(i for i in dict.fromkeys(first) if i in found), *sorted(found - set(first))]


def _placement(layout: Layout, sizes: Sizes) -> tuple[object, ...]:
    """The same for two layouts exactly when they put every label on the same row."""
    return tuple(sorted((part.path.names, part.start, _joined(part.heads), _joined(part.dims)) for part in parts(layout, sizes)))


def _joined(digits: tuple[Digit, ...]) -> tuple[tuple[int, int], ...]:
    """(size, stride) of the digits of a number, neighbours that step as one joined."""
    out: list[tuple[int, int]] = []
    for digit in digits:
        if digit.size == 1:
            continue
        if out and out[-1][1] == digit.size * digit.stride:
            out.append((out.pop()[0] * digit.size, digit.stride))
        else:
            out.append((digit.size, digit.stride))
    return tuple(out)
