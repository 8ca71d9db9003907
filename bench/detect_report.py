"""How far the verdicts of `detect` can be trusted: real trained layers in many layouts, some of them never used to set a threshold, and
controls of which nothing may be said. Writes docs/detection.md and docs/detection.svg from the lines of bench/detect_cases.py.

python -m bench.detect_report [--quick] [--jobs N] [--write]     about 20 CPU minutes; --quick takes a seventh of the cases
"""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench.detect_cases import GROUPED, LAYERS, LINES, MODES, ONE_TO_ONE, OUTSIDE_ALONE, WITH_O, collect
from bench.detect_words import HELD_OUT, LOOKED_AT, SEEN, SET_ON, SETTING, UNSEEN, limits, method, split
from tests import weights

from triptych import verdict as rule
from triptych.detect import CONFIDENT, detect

PAGE = Path(__file__).parent.parent / "docs" / "detection.md"
TARGETS = {"with O": 0.98, "W alone": 0.97}
MET, MISSED = "met", "**MISSED**"


class Case(NamedTuple):
    """One layer in one layout. `true`, `other`: nats of the true layout and of the best that sets other rows side by side."""

    net: str
    layer: int
    layout: str
    mode: str
    kind: str
    columns: int
    confidence: str
    right: bool
    best: str
    reason: str
    seconds: float
    true: float | None
    other: float | None

    @property
    def sure(self) -> bool:
        return self.confidence == CONFIDENT

    @property
    def half(self) -> str:
        if (self.net, self.layer) in UNSEEN:
            return HELD_OUT
        if self.net in SET_ON or (self.net == "smollm2" and self.layer % 2 == 0):
            return SETTING
        return LOOKED_AT if self.net in SEEN else HELD_OUT


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--quick", action="store_true")
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options.add_argument("--write", action="store_true", help="docs/detection.md and docs/detection.svg")
    given = options.parse_args()
    weights.nets()
    lines = collect(given.jobs, given.quick)
    page, picture = report(lines), scatter(cases(lines))
    home = PAGE if given.write else LINES.with_name("detection.md")
    home.write_text(page)
    home.with_suffix(".svg").write_text(picture)
    print(page)


def cases(lines: Iterable[dict[str, Any]]) -> list[Case]:
    found = []
    for line in (line for line in lines if "net" in line):
        shared = {key: line[key] for key in ("net", "layout", "mode", "kind", "columns")}
        found += [Case(**shared, **{key: layer[key] for key in Case._fields if key in layer}) for layer in line["layers"]]
    order = [net.name for net in weights.nets()]
    modes = list(MODES)
    return sorted(found, key=lambda one: (order.index(one.net), modes.index(one.mode) if one.mode in modes else 2, place(one.layout)))


def place(layout: str) -> int:
    layouts = (*ONE_TO_ONE, *GROUPED, *WITH_O)
    return layouts.index(layout) if layout in layouts else len(layouts)


def by_layout(found: Iterable[Case]) -> list[Case]:
    return sorted(found, key=lambda one: (place(one.layout), one.layout, one.mode == "W alone"))


# The page


def report(lines: list[dict[str, Any]]) -> str:
    every = cases(lines)
    attention = [one for one in every if one.kind == "q|k|v"]
    fit = [one for one in attention if one.columns >= rule.MIN_COLUMNS]
    controls = tally(lines)
    layers = {(one.net, one.layer) for one in fit}
    return "\n".join([
        "# Detection: how far a verdict from weights can be trusted", "",
        "`triptych detect` reads the layout of a fused weight out of its trained values. This page is made by `make detect-report`; it says "
        "how that works, how often it is right, and what it cannot tell.", "",
        *method(), "",
        "## The cases", "",
        f"{len({one.net for one in attention})} trained nets of {len(weights.PACKAGES)} packages, {len({(o.net, o.layer) for o in attention})} layers, each laid out in {len(ONE_TO_ONE)} ways "
        f"({len(GROUPED)} other ones for the net with fewer kv heads than query heads, {len(WITH_O)} more with O): {len(attention)} verdicts. *With O*: {MODES['with O']}. *W alone*: {MODES['W alone']}. "
        f"Of {' and '.join(f'{name} {len(chosen)} layers' for name, chosen in LAYERS.items())} were taken, of the other nets all. *argmax*: the best layout is the true one, to the row; *coverage*: share of confident "
        "verdicts; *confident error*: confident and wrong, in the rows or in the number of heads where one is told.", "",
        f"One net, SCEPTR_tiny, has {min(one.columns for one in attention)} columns. Below {rule.MIN_COLUMNS} nothing is ever said, since untrained weights of that size can look trained; it stands in "
        "the table of models and counts nowhere else.", "",
        *split(layers), "",
        "## Targets", "", *targets(fit, controls, lines), "",
        "## Held out, and not", "", *table("layers", sorted(fit, key=lambda one: (SETTING, LOOKED_AT, HELD_OUT).index(one.half)), lambda one: one.half), "",
        *bounds(fit), "",
        *errors(fit), "",
        "## By model", "", *table("net", attention, lambda one: f"{one.net} ({one.columns})"), "",
        "In brackets: columns. Held out alone:", "", *table("net", [o for o in fit if o.half == HELD_OUT], lambda one: one.net), "",
        "All layers of a net together (`pool`), one vote for each net and layout:", "", *votes(lines), "",
        "## By layout", "", *table("layout", by_layout(fit), lambda one: code(one.layout)), "",
        "Held out alone:", "", *table("layout", by_layout(o for o in fit if o.half == HELD_OUT), lambda one: code(one.layout)), "",
        "## k and v alone, gate and up", "",
        "SmolLM2. Up is told from gate by norms: scaling a row of up and dividing the column of down changes nothing, so training balances them, and gate's rows it does not. "
        "Without down only the arrangement can be told, not which is which: the verdict is *weak* at best.", "",
        *table("layout", by_layout(one for one in every if one.kind != "q|k|v"), lambda one: code(one.layout)), "",
        "## Controls", "", "| what | cases | confident errors | bound |", "|---|---|---|---|",
        *(f"| {name} | {count} | {len(wrong)} | {f'{3 / count:.2%}' if not wrong else ''} |" for name, (count, wrong) in controls.items()), "",
        "Bound: the true rate is lower, with 95 % confidence, where no error was seen (rule of three). The last row is a known limit: without O nothing tells that the true layout is not among those compared.",
        *(f"\n{name}: {'; '.join(wrongly(one) for one in wrong)}." for name, (_, wrong) in controls.items() if wrong and name != OUTSIDE_ALONE), "",
        "## Statistic against hypothesis", "", "Nats of every layout that fits, one layer of SCEPTR_large stored as `h (q|k|v) d`, with O:", "", "```", *bars(lines), "```", "",
        "All cases, the true layout against the best one that sets other rows side by side (each dot a layer in a layout; right of the line the true one leads by "
        f"{rule.MIN_LEAD:.0f} nats and {rule.MIN_RATIO} times):", "", "![nats of the true layout against the best other one](detection.svg)", "",
        "## Rotary order", "", *turns(lines), "",
        "## Time", "", *timings(attention), "",
        *limits(), "",
    ])  # fmt: skip


def tally(lines: list[dict[str, Any]]) -> dict[str, tuple[int, list[Any]]]:
    found: dict[str, tuple[int, list[Any]]] = {}
    for line in sorted(
        (line for line in lines if "control" in line),
        key=lambda line: (
            line["control"] == OUTSIDE_ALONE,
            line["control"] != "random initialisations, 32 to 64 columns",
            line["control"],
            line["start"],
        ),
    ):
        count, wrong = found.get(line["control"], (0, []))
        found[line["control"]] = count + line["cases"], wrong + line["wrong"]
    return found


def wrongly(one: list[Any]) -> str:
    _, case, layout, nats = one
    return f"{' '.join(map(str, case))}, said {code(layout, False)}, {nats:.0f} nats ahead"


def targets(fit: list[Case], controls: dict[str, tuple[int, list[Any]]], lines: list[dict[str, Any]]) -> list[str]:
    out = ["| target | | |", "|---|---|---|"]
    wrong = sum(one.sure and not one.right for one in fit)
    out.append(
        f"| 0 confident errors on real layers | {MET if not wrong else MISSED} | {wrong} of {sum(one.sure for one in fit)} confident |"
    )
    bad = sum(len(found) for name, (_, found) in controls.items() if name != OUTSIDE_ALONE)
    count = sum(count for name, (count, _) in controls.items() if name != OUTSIDE_ALONE)
    out.append(f"| 0 confident errors in controls | {MET if not bad else MISSED} | {bad} of {count} |")
    for mode, aim in TARGETS.items():
        for half, members in (("all", fit), (HELD_OUT, [one for one in fit if one.half == HELD_OUT])):
            found = [one.sure for one in members if one.mode == mode]
            share = sum(found) / max(len(found), 1)
            out.append(f"| coverage {aim:.0%} {mode}, {half} | {MET if share >= aim else MISSED} | {share:.1%} of {len(found)} |")
    asked = [line for line in lines if "net" in line and line["kind"] == "q|k|v" and line["columns"] >= rule.MIN_COLUMNS]
    right = sum(line["vote"]["right"] for line in asked)
    out.append(f"| every vote of a net right | {MET if right == len(asked) else MISSED} | {right} of {len(asked)} |")
    out += [
        "",
        "`triptych detect PATH` pools the layers of a checkpoint. Its answers, one for each net and layout, are not the coverage above, which is of single layers:",
        "",
    ]
    for mode in MODES:
        found = [line["vote"] for line in asked if line["mode"] == mode]
        sure = sum(vote["confidence"] == CONFIDENT for vote in found)
        out.append(
            f"- {mode}: {sure} of {len(found)} confident ({sure / max(len(found), 1):.1%}), {sum(vote['confidence'] == CONFIDENT and not vote['right'] for vote in found)} of them wrong."
        )
    return out


def table(head: str, found: Iterable[Case], key: Callable[[Case], str]) -> list[str]:
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for one in found:
        groups[key(one), one.mode].append(one)
    lines = [f"| {head} | mode | cases | argmax | coverage | confident errors |", "|---|---|---|---|---|---|"]
    for (name, mode), members in groups.items():
        right, sure = sum(one.right for one in members), sum(one.sure for one in members)
        wrong = sum(one.sure and not one.right for one in members)
        lines.append(f"| {name} | {mode} | {len(members)} | {right / len(members):.1%} | {sure / len(members):.1%} | {wrong} |")
    return lines


def bounds(fit: list[Case]) -> list[str]:
    out = []
    for mode in MODES:
        found = [one for one in fit if one.mode == mode and one.sure and one.half == HELD_OUT]
        wrong, layers = sum(not one.right for one in found), len({(one.net, one.layer) for one in found})
        bound = (
            f"at most {3 / max(len(found), 1):.2%} of confident verdicts are wrong (95 %, rule of three)"
            if not wrong
            else "no bound by the rule of three"
        )
        out.append(f"- {mode}: {len(found)} confident verdicts on held-out layers, {wrong} wrong: {bound}. One layer in twelve layouts is not twelve layers: "
                   f"counted in layers, {layers} of them bound the rate at {3 / max(layers, 1):.0%} only.")  # fmt: skip
    return out


def errors(fit: list[Case]) -> list[str]:
    """All confident errors, and why the others are not covered."""
    wrong = [one for one in fit if one.sure and not one.right]
    out = ["Confident errors, all of them:" if wrong else "No verdict on a real layer was confident and wrong."]
    out += [
        f"- {one.net} layer {one.layer}, {code(one.layout, False)} {one.mode}: said {code(one.best, False)} ({one.half})" for one in wrong
    ]
    kinds: dict[str, int] = defaultdict(int)
    for one in (one for one in fit if not one.sure):
        kinds["".join("N" if c.isdigit() else c for c in one.reason.split(":")[0].split(" ahead of ")[0])] += 1
    out += [
        "",
        "Why the others are not covered. With O it is mostly v of which O says nothing, and k that norms hardly tell from a query head; W alone, other heads that resemble each other as q and k do. "
        "Lower thresholds would cover more, and believe layouts that are not compared.",
    ]
    out += ["", "| reason | cases |", "|---|---|"]
    merged: dict[str, int] = defaultdict(int)
    for reason, count in kinds.items():
        short = reason
        while "NN" in short:
            short = short.replace("NN", "N")
        merged[short.replace("|", "\\|")] += count
    return [*out, *(f"| {reason} | {count} |" for reason, count in sorted(merged.items(), key=lambda item: -item[1])[:8])]


def votes(lines: list[dict[str, Any]]) -> list[str]:
    out = ["| net | mode | votes | right | confident | confident errors |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    order = [net.name for net in weights.nets()]
    fit = [line for line in lines if "net" in line and line["kind"] == "q|k|v" and line["columns"] >= rule.MIN_COLUMNS]
    for line in sorted(fit, key=lambda line: (order.index(line["net"]), list(MODES).index(line["mode"]))):
        groups[line["net"], line["mode"]].append(line["vote"])
    for (net, mode), found in groups.items():
        sure = [vote for vote in found if vote["confidence"] == CONFIDENT]
        out.append(
            f"| {net} | {mode} | {len(found)} | {sum(v['right'] for v in found)} | {len(sure)} | {sum(not v['right'] for v in sure)} |"
        )
    return out


def code(layout: str, in_table: bool = True) -> str:
    return f"`{layout}`".replace("|", "\\|") if in_table else f"`{layout}`"


def bars(lines: list[dict[str, Any]]) -> list[str]:
    ranked = next((line["ranked"] for line in lines if line.get("ranked")), [])
    best: dict[str, tuple[float, float]] = {}
    for layout, sizes, qk, vo in ranked:
        best.setdefault(f"{layout}  {sizes}", (qk, vo))
    shown = sorted(best.items(), key=lambda item: -sum(item[1]))[:16]
    scale = max((sum(nats) for _, nats in shown), default=1.0) / 56
    out = [f"{name:36s} {'#' * round(qk / scale)}{'o' * round(vo / scale)} {qk + vo:.0f}" for name, (qk, vo) in shown]
    return [*out, "", f"# q against k   o v against O   in nats; {max(len(best) - len(shown), 0)} layouts with fewer are left out"]


def scatter(found: list[Case]) -> str:
    """A small picture: x the true layout's nats, y the best other's, both log(1 + nats)."""
    size, high = 400, math.log1p(8192)
    place = lambda nats: round(size * min(math.log1p(max(nats, 0.0)), high) / high)  # noqa: E731
    dots: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for one in found:
        if one.kind == "q|k|v" and one.columns >= rule.MIN_COLUMNS and one.true is not None and one.other is not None:
            colour = "#c22" if not one.right else "#1769aa" if one.half == HELD_OUT else "#999"
            dots[colour].add((place(one.true), place(one.other)))
    ticks = [0, 1, 4, 16, 64, 256, 1024, 4096]
    edge = [(place(y + max(rule.MIN_LEAD, y * (rule.MIN_RATIO - 1))), place(y)) for y in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)]
    text = 'font-family="sans-serif" font-size="11" fill="#555"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-50 -10 {size + 70} {size + 90}">',
        f'<rect x="-50" y="-10" width="{size + 70}" height="{size + 90}" fill="#fff"/>',
    ]
    out += [
        f'<text x="{place(t)}" y="{size + 16}" text-anchor="middle" {text}>{t}</text><text x="-8" y="{size - place(t) + 4}" text-anchor="end" {text}>{t}</text>'
        for t in ticks
    ]
    out.append(
        f'<path d="M0 0V{size}H{size}" fill="none" stroke="#555"/><path d="M{"L".join(f"{x} {size - y}" for x, y in edge)}" fill="none" stroke="#555" stroke-dasharray="4 3"/>'
    )
    for colour in ("#999", "#1769aa", "#c22"):
        path = "".join(f"M{x} {size - y}h0" for x, y in sorted(dots[colour]))
        out.append(f'<path d="{path or "M0 0"}" stroke="{colour}" stroke-width="4" stroke-linecap="round" stroke-opacity=".6"/>')
    out.append(f'<text x="{size // 2}" y="{size + 36}" text-anchor="middle" {text}>nats of the true layout</text>')
    out.append(f'<text transform="translate(-36 {size // 2}) rotate(-90)" text-anchor="middle" {text}>nats of the best other one</text>')
    out += [f'<circle cx="{x}" cy="{size + 56}" r="4" fill="{colour}"/><text x="{x + 10}" y="{size + 60}" {text}>{name}</text>'
            for x, colour, name in ((10, "#1769aa", "held out"), (100, "#999", "set on or looked at"), (250, "#c22", "another layout said"))]  # fmt: skip
    return "\n".join([*out, "</svg>\n"])


def turns(lines: list[dict[str, Any]]) -> list[str]:
    """The order of rotary pairs that each net shows in its plainest layout."""
    out = [
        "Half against interleaved pairs, by the norms of pairs, all layers of a net (|z| above 3 tells):",
        "",
        "| net | layers | stored | found | z |",
        "|---|---|---|---|---|",
    ]
    for net in weights.nets():
        plain = GROUPED[0] if net.heads > net.kv_heads else ONE_TO_ONE[0]
        turn = next((line["rotary"] for line in lines if line.get("net") == net.name and line["layout"] == plain and line["rotary"]), None)
        if turn is not None and net.head_dim >= 15:
            stored = "interleaved" if net.name == "smollm2" else "no rotary embedding"
            out.append(f"| {net.name} | {turn['layers']} | {stored} | {turn['order'] or 'no evidence'} | {turn['z']:.1f} |")
    return out


def timings(attention: list[Case]) -> list[str]:
    out = [
        "CPU seconds of one thread, on a machine that did other work beside:",
        "",
        "| columns | mode | layers | median | largest |",
        "|---|---|---|---|---|",
    ]
    for columns in sorted({one.columns for one in attention}):
        for mode in MODES:
            seconds = [one.seconds for one in attention if one.columns == columns and one.mode == mode]
            if seconds:
                out.append(f"| {columns} | {mode} | {len(seconds)} | {np.median(seconds):.2f} | {max(seconds):.2f} |")
    rng = np.random.default_rng(0)
    weight, o = rng.standard_normal((12288, 4096), np.float32), rng.standard_normal((4096, 4096), np.float32)
    start = time.process_time()
    detect(weight, o)
    out.append(f"| 4096 (12288 rows, random) | with O | 1 | {time.process_time() - start:.2f} | |")
    return out


if __name__ == "__main__":
    main()
