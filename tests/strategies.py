"""Layouts and sizes that every law is tried on. New features join here."""

from __future__ import annotations

from hypothesis import strategies as st

import triptych as tt

MHA = [
    "h (q|k|v) d",
    "(q|k|v) h d",
    "h d (q|k|v)",
    "(q|k|v) d h",
    "d h (q|k|v)",
    "(k|v|q) h d",
    "h (v|q|k) d",
    "m (q|v|k) n d",
    "t n (q|k|v) d",
    "(q|k|v) h c p",
    "(q|k|v) h p c",
    "h (q|k|v) p c",
    "h p (q|v|k) c",
    "n t (q|k|v) d",
    "(q h d|k h p c|v d h)",
]
GQA = [
    "(q h|k g|v g) d",
    "(q g r|k g|v g) d",
    "(q r g|k g|v g) d",
    "g (q r|k|v) d",
    "g (k|v|q r) d",
    "t (q n r|k n|v n) d",
    "t (v n|q r n|k n) c p",
    "(q g r|k g|v g) p c",
    "(q n r t|k n t|v t n) d",
    "(v g|q h|k g) d",
    "g d (q r|k|v)",
    "_ g (q r|k) d|v g d",
]
PARTIAL = [
    "h (q|k|v) (rot c p|pass u)",
    "(q|k|v) h (rot p c|pass u)",
    "h (pass u|rot c p) (q|v|k)",
    "(q|k|v) (rot c p|pass u) h",
    "(q|k|v) h (rot c p|pass n)",
]
OTHER = [
    "h (k_nope dn|v dv)",
    "(k_nope h dn|v h dv)",
    "(gate|up) f",
    "f (gate|up)",
    "(up|gate) f",
    "g (q dk|k dk|v r dv|z r dv)",
    "(q g dk|k g dk|v h dv|z h dv)",
    "_ g (q r|k|v) d|gate h",
    "gate h|_ g (q r|k|v) d",
    "(q|k d|v d)",
    "(v d|k d|q)",
    "h (nope dn|rope p c)",
    "h (rope c p|nope dn)",
]
ALL = [*MHA, *GQA, *PARTIAL, *OTHER]
FREE = ("u", "n", "f", "dk", "dv", "dn")


def sizes_for(
    *layouts: tt.Layout, draw: object = None, t: int = 2, n: int = 3, r: int = 5, p: int = 7, free: tuple[int, ...] = (11, 13, 17)
) -> dict[str, int]:
    """Sizes of every axis the layouts need: kv heads 6, query heads 30, head dim 14 unless told otherwise; no two equal."""
    used = dict.fromkeys(axis for layout in layouts for axis in layout.axes)
    mha = "q" in {part.split(".")[0] for layout in layouts for part in layout.parts} and not {"g", "r"} & set(used)
    full = {"t": t, "m": t, "g": t * n, "n": n, "r": r, "h": t * n * (1 if mha else r), "c": 2, "p": p, "d": 2 * p}
    spare = iter(free)
    return {
        axis: next(spare) if axis in FREE and not (axis == "n" and not any(x.n_is_free for x in layouts)) else full[axis] for axis in used
    }


@st.composite
def bound_sizes(draw: st.DrawFn, *layouts: tt.Layout) -> dict[str, int]:
    """Random sizes with kv heads, ratio, heads, head dim and the free dims pairwise different."""
    t, n, r, p = draw(st.permutations([1, 2, 3, 5, 4]).map(lambda x: x[:4]))
    heads = {t * n, r, t * n * r, 2 * p}
    free = [x for x in draw(st.permutations(range(1, 20))) if x not in heads][:4]
    return sizes_for(*layouts, t=t, n=n, r=r, p=p, free=tuple(free))


@st.composite
def random_layouts(draw: st.DrawFn) -> tt.Layout:
    """Any layout with up to three parts of heads and dims, with axes anywhere before, in or after the sum."""
    heads = draw(st.sampled_from([["h"], ["g", "r"], ["t", "n"], ["t", "n", "r"]]))
    dims = draw(st.sampled_from([["d"], ["c", "p"], ["x", "y"], []]))
    names = draw(st.permutations(["q", "k", "v"]).map(lambda x: x[: draw(st.integers(1, 3))]))
    places = draw(st.lists(st.integers(0, 2), min_size=len(heads) + len(dims), max_size=len(heads) + len(dims)))
    groups: list[list[str]] = [[], [], []]
    for axis, place in zip(draw(st.permutations(heads + dims)), places, strict=True):
        groups[place].append(axis)
    before, inside, after = (" ".join(group) for group in groups)
    branches = "|".join(f"{name} {inside}".strip() for name in names)
    return tt.Layout(f"{before} ({branches}) {after}")
