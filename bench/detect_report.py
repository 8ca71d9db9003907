"""How far the verdicts of `detect` can be trusted: real trained layers in many layouts, half of them never used to set a threshold; and
controls that nothing may be said of. Writes docs/detection.md.

python -m bench.detect_report [--quick] [--jobs N] [--write]     about 20 minutes of one core; --quick takes a seventh of it
"""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tests import weights

import triptych as tt
from triptych import verdict as rule
from triptych.detect import CONFIDENT, Verdict, detect, pool
from triptych.rowmap import parts

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "detection.md"
SAVED = ROOT / ".bench" / "detect.json"
ONE_TO_ONE = (
    "(q|k|v) h d", "(q|v|k) h d", "(v|q|k) h d", "h (q|k|v) d", "h (q|v|k) d", "h (v|q|k) d", "h d (q|k|v)", "t (q|k|v) n d",
    "t (q|v|k) n d", "(q|k|v) d h", "d (q|k|v) h", "d h (q|k|v)",
)  # fmt: skip
GROUPED = (
    "(q h|k g|v g) d", "(q h|v g|k g) d", "(v g|q h|k g) d", "(k g|q h|v g) d", "(k g|v g|q h) d", "g (q r|k|v) d", "g (q r|v|k) d",
    "g (v|q r|k) d", "g (k|v|q r) d", "(q r g|k g|v g) d", "q d h|k d g|v d g", "g d (q r|k|v)",
)  # fmt: skip
KEY_VALUE = ("(k|v) g d", "(v|k) g d", "g (k|v) d")
MLP = ("(gate|up) f", "(up|gate) f", "f (gate|up)", "t (up|gate) f")
OUTSIDE = ("(q|k) h d|v d h", "_ h (q|k) d|v h d", "q h d|_ h (k|v) d", "q h d|k d h|v h d", "q d h|k h d|v h d")
"""Layouts that `detect` does not compare."""
BLOCKS = {"t (q|k|v) n d": 2, "t (q|v|k) n d": 4, "t (up|gate) f": 4}
SETTING = {"A_SCEPTR", "SCEPTR", "SCEPTR_CDR3_only", "SCEPTR_MLM_only", "SCEPTR_dropout_noise_only", "SCEPTR_left_aligned", "SCEPTR_small",
           "minilm", "rapidocr"}  # fmt: skip
"""Nets on which thresholds were set; of SmolLM2, the layers with an even number. All others were held out."""
LAYERS = {"smollm2": (0, 3, 4, 9, 10, 14, 15, 19, 20, 25, 26, 29), "antiberty": (0, 2, 4, 5, 7)}
"""Layers that are looked at, where not all are."""
MODES = {"with O": "the output projection, heads unknown", "W alone": "the number of heads, no output projection"}


class Job(NamedTuple):
    net: int
    layer: int
    layout: str
    mode: str
    kind: str = "q|k|v"


class Result(NamedTuple):
    """`right`: the best layout is the true one, heads included where a number of heads is told."""

    job: Job
    confidence: str
    right: bool
    lead: float
    seconds: float
    verdict: Verdict


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--quick", action="store_true")
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options.add_argument("--write", action="store_true", help="docs/detection.md")
    given = options.parse_args()
    weights.nets()
    step = 7 if given.quick else 1
    with get_context("fork").Pool(given.jobs) as workers:
        run = lambda function, items: list(workers.imap(function, items, chunksize=4))  # noqa: E731
        results = run(judged, list(jobs())[::step])
        controls = {name: sum(run(confident, items[::step])) for name, items in CONTROLS.items()}
        counts = {name: len(items[::step]) for name, items in CONTROLS.items()}
    page = report(results, controls, counts)
    SAVED.parent.mkdir(exist_ok=True)
    SAVED.write_text(json.dumps([[*r.job, r.confidence, r.right, r.lead, r.seconds] for r in results]))
    (PAGE if given.write else SAVED.with_suffix(".md")).write_text(page)
    print(page)


def jobs() -> Iterator[Job]:
    for i, net in enumerate(weights.nets()):
        for layer in LAYERS.get(net.name, range(len(net.layers))):
            for layout in ONE_TO_ONE if net.heads == net.kv_heads else GROUPED:
                for mode in MODES:
                    yield Job(i, layer, layout, mode)
            if net.name == "smollm2":
                yield from (Job(i, layer, layout, "with Q and O", "k|v") for layout in KEY_VALUE)
                yield from (Job(i, layer, layout, mode, "gate|up") for layout in MLP for mode in ("with down", "alone"))


def sizes(net: weights.Net, layout: str) -> dict[str, int]:
    axes = tt.Layout(layout).axes
    known = {"h": net.heads, "g": net.kv_heads, "d": net.head_dim, "r": net.heads // net.kv_heads}
    if layout in BLOCKS:
        known |= {"t": BLOCKS[layout], "n": net.heads // BLOCKS[layout]}
    if "f" in axes:
        known |= {"f": len(net.layers[0]["up"]) // (BLOCKS[layout] if "t" in axes else 1)}
    return {axis: known[axis] for axis in axes}


def fused(net: weights.Net, layer: int, layout: str) -> np.ndarray:
    """[rows, in] of a layer in a layout."""
    table = net.layers[layer]
    if "gate" in layout:
        whole = np.concatenate([table["gate"], table["up"]])
        return tt.repack(whole, "(gate|up) t f" if "t" in sizes(net, layout) else "(gate|up) f", layout, axis=0, **sizes(net, layout))
    names = "kv" if "q" not in layout else "qkv"
    tensors = {name: table[name].reshape(-1, net.head_dim, table[name].shape[1]).transpose(2, 0, 1) for name in names}
    return np.ascontiguousarray(tt.fuse(tensors, layout, **sizes(net, layout)).T)


def judged(job: Job) -> Result:
    net = weights.nets()[job.net]
    table, weight = net.layers[job.layer], fused(net, job.layer, job.layout)
    start = time.process_time()
    if job.kind == "gate|up":
        found = detect(weight, table["down"] if job.mode == "with down" else None, parts=job.kind)
    elif job.kind == "k|v":
        found = detect(weight, table["o"], parts=job.kind, q=table["q"])
    elif job.mode == "with O":
        found = detect(weight, table["o"])
    else:
        found = detect(weight, heads=net.heads)
    seconds = time.process_time() - start
    return Result(job, found.confidence, is_right(found, net, job.layout), found.evidence, seconds, found)


def is_right(found: Verdict, net: weights.Net, layout: str) -> bool:
    if not found.ranked:
        return False
    best = found.ranked[0]
    if rows(best.layout, best.sizes) != rows(tt.Layout(layout), tt.bind(layout, **sizes(net, layout))):
        return False
    told = found.sizes or {}
    return all(told.get(axis, number) == number for axis, number in (("h", net.heads), ("g", net.kv_heads)))


def rows(layout: tt.Layout, bound: tt.Sizes) -> dict[str, bytes]:
    return {part.path.names[0]: part.rows().tobytes() for part in parts(layout, bound)}


# What nothing may be said of


def confident(control: Callable[[], Verdict | None]) -> bool:
    found = control()
    return found is not None and found.confidence == CONFIDENT


class Untrained(NamedTuple):
    seed: int

    def __call__(self) -> Verdict:
        """Plain; uniform; parts of other scales; rows with a common direction; heads of other scales; with O, or the heads known."""
        rng = np.random.default_rng(self.seed)
        d = (32, 32, 32, 48, 64)[self.seed % 5]
        weight, o = rng.standard_normal((3 * d, d), np.float32), rng.standard_normal((d, d), np.float32)
        kind = self.seed // 5 % 5
        if kind == 1:
            weight, o = rng.uniform(-1, 1, weight.shape).astype(np.float32), rng.uniform(-1, 1, o.shape).astype(np.float32)
        elif kind == 2:
            weight[:d] *= 3
            weight[2 * d :] *= 0.5
        elif kind == 3:
            weight += 0.5 * rng.standard_normal((1, d), np.float32)
            o += 0.5 * rng.standard_normal((d, 1), np.float32)
        elif kind == 4:
            scale = rng.gamma(2, 1, (3 * d // 8, 1, 1)).astype(np.float32)
            weight = (weight.reshape(-1, 8, d) * scale).reshape(weight.shape)
        return detect(weight, heads=d // 8) if self.seed % 3 == 0 else detect(weight, o)


class Shuffled(NamedTuple):
    seed: int

    def __call__(self) -> Verdict:
        net = _wide()[self.seed % len(_wide())]
        layer = self.seed // len(_wide()) % len(net.layers)
        weight = fused(net, layer, "(q|k|v) h d")[np.random.default_rng(self.seed).permutation(3 * net.heads * net.head_dim)]
        return detect(weight, heads=net.heads) if self.seed % 3 == 0 else detect(weight, net.layers[layer]["o"])


class Foreign(NamedTuple):
    """The output projection of another layer. A confident verdict counts where it is wrong."""

    net: int
    layer: int
    step: int

    def __call__(self) -> Verdict | None:
        net = weights.nets()[self.net]
        layout = (ONE_TO_ONE if net.heads == net.kv_heads else GROUPED)[self.layer % 6]
        found = detect(fused(net, self.layer, layout), net.layers[(self.layer + self.step) % len(net.layers)]["o"])
        return None if is_right(found, net, layout) else found


class Outside(NamedTuple):
    """A layout that is not compared."""

    net: int
    layer: int
    layout: str

    def __call__(self) -> Verdict:
        net = weights.nets()[self.net]
        return detect(fused(net, self.layer, self.layout), net.layers[self.layer]["o"])


def _wide() -> list[weights.Net]:
    return [net for net in weights.nets() if 32 <= net.layers[0]["q"].shape[1] <= 128]


def _some(step: int = 1) -> list[tuple[int, int]]:
    """Nets and layers, few of the large ones."""
    found = [(i, layer) for i, net in enumerate(weights.nets()) for layer in range(len(net.layers))]
    return [(i, layer) for i, layer in found if len(weights.nets()[i].layers) <= 4 or layer % 4 == step]


CONTROLS: dict[str, list[Callable[[], Verdict | None]]] = {
    "random initialisations": [Untrained(seed) for seed in range(5000)],
    "real rows, shuffled": [Shuffled(seed) for seed in range(500)],
    "O of another layer": [Foreign(i, layer, step) for i, layer in _some() for step in (1, 2)],
    "layouts that are not compared, with O": [
        Outside(i, layer, layout) for i, layer in _some() if weights.nets()[i].heads == weights.nets()[i].kv_heads for layout in OUTSIDE
    ],
}  # fmt: skip


# The page


def report(results: list[Result], controls: dict[str, int], counts: dict[str, int]) -> str:
    attention = [r for r in results if r.job.kind == "q|k|v"]
    fit = [r for r in attention if not narrow(r)]
    lines = [
        "# Detection: how far a verdict from weights can be trusted", "",
        "`triptych detect` reads a layout out of trained weights. This page is generated by `make detect-report` and says how often it is "
        "right, on layers that no threshold was set on.", "",
        f"{len({r.job.net for r in results})} nets of {len(weights.PACKAGES)} packages, "
        f"{len({r.job[:2] for r in attention})} layers in {len(ONE_TO_ONE)} layouts each ({len(GROUPED)} others where several query heads "
        f"share a kv head). With O: {MODES['with O']}. W alone: {MODES['W alone']}. *argmax*: the best layout is the true one; *coverage*: "
        "share of confident verdicts; *confident errors*: confident and wrong, in the rows or in the number of heads.", "",
        "## Held out, and not", "",
        *table("layers", fit, lambda r: "thresholds set on" if is_setting(r) else "held out"), "",
        bounds([r for r in fit if not is_setting(r)]), "",
        thresholds([r for r in attention if is_setting(r)]), "",
        "## By model", "", *table("net", attention, lambda r: weights.nets()[r.job.net].name), "",
        f"SCEPTR_tiny has 16 columns: below {rule.MIN_COLUMNS} nothing is said, and it is left out above.", "",
        "All layers of a net together (`pool`), one vote a net and layout:", "", *votes(fit), "",
        "## By layout", "", *table("layout", fit, lambda r: f"`{r.job.layout}`".replace("|", "\\|")), "",
        "## k and v alone, gate and up", "",
        "SmolLM2. Which of gate and up is which: up's row norms follow those of down's columns, as scaling one and dividing the other changes "
        "nothing; gate's do not. Without down only the arrangement can be told, and the verdict is *weak*.", "",
        *table("layout", [r for r in results if r.job.kind != "q|k|v"], lambda r: f"`{r.job.layout}`".replace("|", "\\|")), "",
        "## Controls", "", "| what | cases | confident errors |", "|---|---|---|",
        *(f"| {name} | {counts[name]} | {wrong} |" for name, wrong in controls.items()), "",
        "## Statistic against hypothesis", "", "```", *figure(fit), "```", "",
        "## Rotary order", "", *rotary_lines(), "",
        "## Limits", "",
        *targets(fit, controls), "",
        "- Q against K of equal size is a convention: the loss is symmetric in them.",
        "- The layers of one net are alike, and one layer in twelve layouts is not twelve layers. The bounds above count cases; counted in "
        f"layers, {len({r.job[:2] for r in fit if not is_setting(r)})} held-out ones without an error bound the rate at "
        f"{3 / max(len({r.job[:2] for r in fit if not is_setting(r)}), 1):.0%}.",
        "- The first thresholds came from a study that had seen these packages, though not these statistics.",
        "- Only one net here has fewer kv heads than query heads, and its weights are quantised to 4 bits. Without O its query heads look more "
        "like each other than like k, so single layers are often not told; norms decide who is k.", "",
        f"A layer takes {np.median([r.seconds for r in attention]):.2f} s of one thread (median), at most "
        f"{max(r.seconds for r in attention):.1f} s.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def narrow(result: Result) -> bool:
    return weights.nets()[result.job.net].layers[0]["q"].shape[1] < rule.MIN_COLUMNS


def is_setting(result: Result) -> bool:
    name = weights.nets()[result.job.net].name
    return result.job.layer % 2 == 0 if name == "smollm2" else name in SETTING


def table(head: str, results: Iterable[Result], key: Callable[[Result], str]) -> list[str]:
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for one in results:
        groups[key(one), one.job.mode].append(one)
    lines = [f"| {head} | mode | cases | argmax | coverage | confident errors |", "|---|---|---|---|---|---|"]
    for (name, mode), found in groups.items():
        right, sure = [sum(r.right for r in found), sum(r.confidence == CONFIDENT for r in found)]
        wrong = sum(r.confidence == CONFIDENT and not r.right for r in found)
        lines.append(f"| {name} | {mode} | {len(found)} | {right / len(found):.1%} | {sure / len(found):.1%} | {wrong} |")
    return lines


def bounds(results: list[Result]) -> str:
    words = []
    for mode in MODES:
        found = [r for r in results if r.job.mode == mode and r.confidence == CONFIDENT]
        wrong = sum(not r.right for r in found)
        bound = (
            f"at most {3 / max(len(found), 1):.2%} of confident verdicts are wrong (95 %, rule of three)" if not wrong else f"{wrong} wrong"
        )
        words.append(f"{mode}: {len(found)} confident verdicts on held-out layers, {wrong} wrong: {bound}.")
    return " ".join(words)


def thresholds(results: list[Result]) -> str:
    wrong = [r for r in results if not r.right]
    lead = max((r.lead for r in wrong if r.confidence == CONFIDENT), default=0.0)
    others = sum(r.lead > rule.MIN_LEAD for r in wrong)
    return (
        f"Thresholds: {rule.MIN_LEAD:.0f} nats ahead and {rule.MIN_RATIO} times as many as the next ({rule.MIN_APART} where the same rows lie "
        f"side by side), {rule.MIN_EACH:.0f} nats from each pair, {rule.MIN_LAW:.0f} from norms. On the layers they were set on, {len(wrong)} "
        f"best layouts are wrong; {others} of them lead by more than {rule.MIN_LEAD:.0f} nats and are held back by the other rules; "
        + (f"the largest lead of a confident wrong one is {lead:.0f}." if lead else "none is confident.")
    )


def votes(results: list[Result]) -> list[str]:
    groups: dict[tuple[int, str, str], list[Result]] = defaultdict(list)
    for one in results:
        groups[one.job.net, one.job.layout, one.job.mode].append(one)
    lines = ["| mode | votes | right | confident | confident errors |", "|---|---|---|---|---|"]
    for mode in MODES:
        found = [(pool(r.verdict for r in members), key) for key, members in groups.items() if key[2] == mode]
        marks = [(vote.confidence == CONFIDENT, is_right(vote, weights.nets()[net], layout)) for vote, (net, layout, _) in found]
        sums = (
            len(marks),
            sum(right for _, right in marks),
            sum(sure for sure, _ in marks),
            sum(sure and not right for sure, right in marks),
        )
        lines.append("| " + " | ".join(map(str, (mode, *sums))) + " |")
    return lines


def figure(results: list[Result]) -> list[str]:
    """Nats of the true layout and of the best other one, each case a point of a histogram over powers of two."""
    lines = ["nats      true layout, best other one: share of cases, one # is 1 %"]
    for mode in MODES:
        pairs = []
        for one in (r for r in results if r.job.mode == mode and r.right):
            best = one.verdict.ranked[0]
            others = (other.nats for other in one.verdict.ranked if other.alignment != best.alignment and other.clique != best.clique)
            pairs.append((best.nats, max(others, default=0.0)))
        lines += ["", mode]
        for low in (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            high = 2 * low or 4
            shares = [sum(low <= pair[i] < high or (high > 8000 <= pair[i]) for pair in pairs) / max(len(pairs), 1) for i in (0, 1)]
            for label, share, mark in zip((f"{low:5d}-", "      "), shares, "#o", strict=True):
                lines.append(f"{label:8s}  {mark * math.ceil(100 * share - 0.5)}".rstrip())
    return [*lines, "", "# true layout   o best other one"]


def rotary_lines() -> list[str]:
    lines = ["| net | layers | true order | found | z |", "|---|---|---|---|---|"]
    for net in weights.nets():
        layout = "(q h|k g|v g) d" if net.heads > net.kv_heads else "(q|k|v) h d"
        chosen = LAYERS.get(net.name, range(len(net.layers)))
        if net.head_dim < 16:
            continue
        verdicts = [detect(fused(net, layer, layout), heads=net.heads, kv_heads=net.kv_heads) for layer in chosen]
        turn = pool(verdicts).rotary
        true = "interleaved (as GGUF stores it)" if net.name == "smollm2" else "none"
        if turn is not None:
            lines.append(f"| {net.name} | {turn.layers} | {true} | {turn.order or 'no evidence'} | {turn.z:.1f} |")
    return lines


def targets(results: list[Result], controls: dict[str, int]) -> list[str]:
    lines = []
    wrong = sum(r.confidence == CONFIDENT and not r.right for r in results) + sum(controls.values())
    lines.append(f"- Target 0 confident errors anywhere: {'met' if not wrong else f'missed, {wrong}'}.")
    for mode, aim in (("with O", 0.98), ("W alone", 0.97)):
        for half, members in (("all", results), ("held out", [r for r in results if not is_setting(r)])):
            found = [r.confidence == CONFIDENT for r in members if r.job.mode == mode]
            share = sum(found) / max(len(found), 1)
            lines.append(f"- Target {aim:.0%} coverage {mode}, {half}: {'met' if share >= aim else 'missed'}, {share:.1%}.")
    return lines


if __name__ == "__main__":
    main()
