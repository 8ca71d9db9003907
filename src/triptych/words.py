"""A layout in words: the order of its rows, its rotary pairs, a list of rows as spans."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from . import rowmap
from .axes import ATOMS, HEAD_ORDER, head_axes
from .layout import Branch, Factor, Layout, Sum

AXIS = {"h": "head", "g": "head", "r": "head", "n": "head", "t": "block", "m": "block", "d": "dim", "c": "component", "p": "pair"}


def order(layout: Layout) -> str:
    """How the rows lie, slowest first; the dims of a head at the end go without saying.

    >>> for text in ("h (q|k|v) d", "(q|k|v) h d", "(q|k|v) d h", "g (q r|k|v) d", "h p c"):
    ...     print(order(Layout(text)))
    head by head: q, k, v
    q, k, v, each head by head
    q, k, v, each dim by dim, head by head
    kv head by kv head: q head by head, k, v
    head by head, interleaved
    """
    return _product(layout.factors) or "dim by dim"


def _product(factors: Sequence[Factor]) -> str:
    at = next((i for i, factor in enumerate(factors) if isinstance(factor, Sum)), None)
    if at is None:
        return ", ".join(_axes([str(factor) for factor in factors], False, True))
    total, rest = factors[at], factors[at + 1 :]
    assert isinstance(total, Sum)
    grouped = "r" in str(total) or any(str(factor) == "r" for factor in rest)
    lead = ", ".join(_axes([str(factor) for factor in factors[:at]], grouped, False))
    inner = [_product(branch.factors) if not rest else ", ".join(_bare(branch)) for branch in total.branches]
    tail = _product(rest)
    if len(set(inner)) == 1:
        tail = ", ".join(filter(None, [inner[0], tail]))
        inner = [""] * len(inner)
    parts = ", ".join(_named(branch, text) for branch, text in zip(total.branches, inner, strict=True))
    return (f"{lead}: " if lead else "") + parts + (f", each {tail}" if tail else "")


def _bare(branch: Branch) -> list[str]:
    """The words of a branch that something follows: its axes all count."""
    if any(isinstance(factor, Sum) for factor in branch.factors):
        return [_product(branch.factors)]
    return _axes([str(factor) for factor in branch.factors], False, False)


def _named(branch: Branch, inner: str) -> str:
    name = "=".join(branch.names) + ("=0" if branch.zero else "")
    if not inner:
        return name or "rows"
    return f"{name} ({inner})".strip() if "," in inner or ":" in inner else f"{name} {inner}".strip()


def _axes(names: list[str], grouped: bool, last: bool) -> list[str]:
    """One phrase for each run of axes; nothing for the dims that come last."""
    numbered = head_axes(names)
    runs: list[list[str]] = []
    for name in names:
        if runs and _goes_on(runs[-1][-1], name, numbered):
            runs[-1].append(name)
        else:
            runs.append([name])
    heads = sum(run[0] in numbered for run in runs)
    words = []
    for i, run in enumerate(runs):
        if run[0] in numbered:
            thing = run[0] if heads > 1 else "kv head" if grouped and run[-1] in ("g", "n") else AXIS[run[-1]]
            words.append(f"{thing} by {thing}")
        elif last and i == len(runs) - 1:
            words += [] if run == ["d"] or "c" not in run else ["half-split"]
        elif last and run == ["p"] and runs[i + 1 :] == [["c"]]:
            words.append("interleaved")
            break
        else:
            thing = AXIS.get(run[0], run[0]) if run != ["c", "p"] else "dim"
            words.append(f"{thing} by {thing}")
    return words


def _goes_on(slow: str, fast: str, heads: tuple[str, ...]) -> bool:
    """Whether the second axis counts within the first: `g r`, `t n`, `c p`."""
    if slow in heads and fast in heads:
        return HEAD_ORDER.index(ATOMS[fast][0]) == HEAD_ORDER.index(ATOMS[slow][-1]) + 1
    return (slow, fast) == ("c", "p") or ({slow, fast}.isdisjoint(heads) and {slow, fast}.isdisjoint("dcp"))


def pairing(part: rowmap.Part) -> str:
    """How far apart the two rows of a rotary pair lie; nothing for a part that does not say.

    >>> from .sizes import bind
    >>> [pairing(rowmap.parts(Layout(text), bind(text, h=3, p=16))[0]) for text in ("h c p", "h p c")]
    ['16 rows apart (half-split, as in Hugging Face)', 'side by side (interleaved, as in Meta LLaMA and GPT-J)']
    """
    strides = {digit.axis: digit.stride for digit in part.digits}
    if not {"c", "p"} <= set(strides):
        return ""
    kind = "half-split, as in Hugging Face" if strides["c"] > strides["p"] else "interleaved, as in Meta LLaMA and GPT-J"
    return f"{strides['c']} rows apart ({kind})" if strides["c"] > 1 else f"side by side ({kind})"


def span(rows: Sequence[int]) -> str:
    """`0-31`, `0, 4, …, 124`, or the few numbers there are.

    >>> span(range(32)), span(range(0, 128, 4)), span([3]), span([0, 2, 1, 3])
    ('0-31', '0, 4, …, 124', '3', '0, 2, 1, 3')
    """
    steps = {b - a for a, b in itertools.pairwise(rows)}
    if len(rows) > 1 and steps == {1}:
        return f"{rows[0]}-{rows[-1]}"
    return ", ".join(map(str, rows)) if len(rows) < 5 else f"{rows[0]}, {rows[1]}, …, {rows[-1]}"
