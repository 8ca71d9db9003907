"""The proof of the table: a small model of every type that transformers can build is run, or loaded, and compared with its record.

`python -m tests.families_report` does so for all of them, each within a time limit, and writes docs/families.md and verified.json;
`python -m tests.families_report TYPE ...` prints what it finds and writes nothing.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import transformers

from tests.families_loaded import loaded
from tests.families_modules import MODULES, alone
from tests.families_small import inputs, small
from triptych.errors import TraceError, TriptychError
from triptych.families import all_records
from triptych.families.config import class_defaults
from triptych.families.declare import Projection, declared
from triptych.families.match import claims_of, hits_of, index_of, tail_of
from triptych.families.records import DATA, generic_records, lookup
from triptych.families.sized import applies
from triptych.layout import Layout
from triptych.live.probe import Probed, probe, smallest
from triptych.live.tiny import classes, instances
from triptych.rowmap import parts
from triptych.sizes import Sizes

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
LIMIT, WORKERS = 300, 2
OTHER_NAMES = {
    "gate": "z",
    "B": "in_gate",
    "C": "out_gate",
    "k_nope": "k",
    "k_rope": "rope",
    "q_nope": "nope",
    "q_rope": "rope",
    "kv_latent": "latent",
    "o": "z",
}
"""Part names that say the same; the probe knows no family's words."""

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 1408}
TWELVE = {"num_attention_heads": 12, "hidden_size": 768}
CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    "bloom": ({"n_head": 6, "hidden_size": 72},),
    "dbrx": ({"attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 1e4}},),
    "deepseek_v2": (EXPERTS, {**EXPERTS, "q_lora_rank": None}),
    "falcon": (
        {"new_decoder_architecture": True, "num_kv_heads": 4, **TWELVE},
        {"multi_query": True, **TWELVE},
        {"multi_query": False, **TWELVE},
    ),
    "gpt_bigcode": ({}, {"multi_query": False}),
    "mamba2": ({"n_groups": 2},),
    "hiera": ({}, {"architecture": "HieraForPreTraining"}),
    **dict.fromkeys(("gpt2", "imagegpt"), ({}, {"add_cross_attention": True})),
    **dict.fromkeys(
        ("deepseek_v3", "axk1", "glm4_moe_lite", "mistral4", "youtu", "longcat_flash", "minicpm3"), ({}, {"q_lora_rank": None})
    ),
}
"""For types whose default config no model can be made of, or that have several layouts; `architecture` is the class."""

ALIKE = {
    "v_head_dim": ("qk_nope_head_dim", 1, 4),
    "qk_nope_head_dim": ("qk_rope_head_dim", 1, 3),
    "index_head_dim": ("qk_rope_head_dim", 2, 3),
    "linear_value_head_dim": ("linear_key_head_dim", 1, 3),
}
"""A size that many configs have so many times as large as another, where records could mix them up, and by how many halves it is made."""

UNSEEN = {
    r"batch_norm": "a batch norm: its numbers belong to the rows of the projection before it",
    r"compressor\..*(kv|gate)_proj$": "its rows are added over a window of tokens before they reach an attention",
    r"kv_points$": "the points are moved by a frame of three dims before they are compared",
    r"conv_qk_depthwise$": "the next convolution mixes the channels of each head before they reach an attention",
}
"""Why some tensors cannot be seen, by the ends of their names."""

Key = tuple[str, str, str, str]
"""An entry of the table: record, tensor, layout, condition."""


@dataclass(frozen=True)
class Compared:
    """One projection of a type: what the record says, what was seen, by which way (`how`), and `fault` when they differ."""

    tensor: str
    declared: str
    executed: str
    rotary: str | None
    fault: str
    keys: tuple[Key, ...] = ()
    how: str = "executed"


@dataclass(frozen=True)
class Verdict:
    """A type: its projections (of like layers the first), seconds, or why nothing was executed."""

    name: str
    compared: tuple[Compared, ...]
    seconds: float
    problem: str = ""

    @property
    def agrees(self) -> bool:
        """Something was executed, and nothing that was differs."""
        return any(one.executed for one in self.compared) and not any(one.fault and one.executed for one in self.compared)

    @property
    def how(self) -> str:
        """ "executed", "loaded" or "read"."""
        if not self.agrees:
            return "read"
        return "executed" if any(one.executed and one.how == "executed" for one in self.compared) else "loaded"


def types() -> list[str]:
    """Every model type with a fused attention, MLA or linear-attention tensor of its own that transformers knows."""
    known = {
        kind for record in all_records() for kind in record.types if any(entry.on_disk and entry.kind != "mlp" for entry in record.entries)
    }
    return sorted(kind for kind in known if kind in transformers.CONFIG_MAPPING)


def model_of(kind: str) -> str:
    """The model that a type is part of, as transformers groups them: qwen2_vl for qwen2_vl_vision."""
    return str(transformers.CONFIG_MAPPING[kind].__module__.split(".")[2])


def verdict(kind: str) -> Verdict:
    """Builds, probes and compares one type, in all its variants."""
    start = time.perf_counter()
    found: dict[tuple[str, ...], Compared] = {}
    problems = []
    for overrides in CONFIGS.get(kind, ({},)):
        try:
            found |= {(re.sub(r"\d+", "{L}", one.tensor), one.executed, one.fault): one for one in reversed(_seen(kind, overrides))}
        except TriptychError as error:
            problems.append(" ".join(str(error.fields.get("found") or error).split())[:160])
        except Exception as error:  # a config class that cannot be made
            problems.append(f"{type(error).__name__}: {error}"[:160])
    if not found and not problems:
        notes = " ".join(record.note for record in lookup(kind))
        problems.append(notes or "the module has no such tensor, and no conversion of one on loading was seen")
    executed = {one.tensor for one in found.values() if one.executed}
    compared = tuple(one for one in reversed(found.values()) if one.executed or one.tensor not in executed)
    return Verdict(kind, compared, time.perf_counter() - start, problems[0] if problems else "")


def _seen(kind: str, overrides: dict[str, Any]) -> list[Compared]:
    """What the first model shows that has the tensors of the type and runs them; of models that are more than it, only its tensors."""
    records = {record.name for record in lookup(kind)} | {record.name for record in generic_records()}
    seen: list[Compared] = []
    failed: Exception | None = None
    try:
        models = _models(kind, overrides)
        for model in models:
            new = _tried(kind, model, records)
            seen += [one for one in new if one.executed or not seen]
            if any(one.executed and one.keys for one in seen):
                break
    except Exception as error:  # whatever the library's own code raises
        failed = error
    if failed is not None and not seen:
        raise failed
    return seen


def _models(kind: str, overrides: dict[str, Any]) -> Iterator[Any]:
    """Small models: of the type, then of the classes that hold more than its base model, then of what it is a tower of."""
    failed: Exception | None = None
    if (part := alone(kind)) is not None:
        yield part
        return
    if (model := small(kind, overrides)) is not None:
        yield model
    for wider, fewer in [_unequal(kind), ({}, {})] if model is None else []:
        try:
            model, _ = smallest(transformers.AutoConfig.for_model(kind, **{**wider, **overrides}), **fewer)
            yield model
        except TriptychError as error:
            failed = failed or error
        if not wider and not fewer:
            break
    for cls in classes(model.config) if model is not None else ():
        if cls is not type(model):
            with contextlib.suppress(Exception):  # a class that needs more than a config
                yield cls(copy.deepcopy(model.config)).eval()
    if any("conversion_mapping" in record.source for record in lookup(kind)):
        for whole in _wholes(kind):
            yield from instances(whole)
    if failed is not None:
        raise failed


def _tried(kind: str, model: Any, records: set[str]) -> list[Compared]:
    """What a model shows of the tensors that these records name: run, or else loaded."""
    config = model.config.to_dict()
    compared: list[Compared] = []

    def ours(found: list[Compared]) -> list[Compared]:
        return [one for one in found if not one.keys or {key[0] for key in one.keys} & records]

    with contextlib.suppress(TraceError):
        shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        compared += ours(_all_compared(config, shapes, probe(model, **inputs(kind, model)), "executed"))
    if not any(one.executed for one in compared) and hasattr(model, "save_pretrained"):
        with contextlib.suppress(RuntimeError, ValueError, TraceError):  # what the library cannot save or load at this size
            shapes, found = loaded(model)
            compared += ours(_all_compared(config, shapes, found, "loaded"))
    return compared


@functools.cache
def _wholes(kind: str) -> list[str]:
    """The types that a tower is part of, whose conversions name its tensors."""
    wholes = [kind]
    for part in wholes:
        wholes += [
            whole
            for whole, known in class_defaults().items()
            if part in known.get("towers", {}).values() and whole in transformers.CONFIG_MAPPING and whole not in wholes
        ]
    return wholes[1:]


def _unequal(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes that differ where a config's own are equal, so that a record which mixes them up shows it.

    First what a config is made with, wider dims of a head; then what stays as it is when the rest is made small,
    fewer kv heads than heads.
    """
    config = transformers.CONFIG_MAPPING[kind]()
    told = vars(config)  # a per-layer attribute raises when it is asked of the whole config
    wider = {
        name: told[name] * more // 2
        for name, (other, times, more) in ALIKE.items()
        if isinstance(told.get(name), int) and told[name] == times * (told.get(other) or 0)
    }
    heads, kv = told.get("num_attention_heads"), told.get("num_key_value_heads")
    if isinstance(heads, int) and heads == kv and heads % 4 == 0 and told.get("kv_lora_rank") is None:
        return wider, {"num_key_value_heads": heads // 4}
    return wider, {}


def _all_compared(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Probed], how: str
) -> list[Compared]:
    said = declared(config, shapes)
    index = index_of(tuple(claims_of(config, (), ())))
    compared = []
    for p in said.projections:
        name = p.name.removesuffix(".weight")
        if p.fused and not p.name.endswith("bias") and (name in found or p.kind != "mlp"):
            keys = tuple(_keys(p, index, shapes))
            compared.append(_compared(name, p, found.get(name), keys, how))
    return compared


def _keys(said: Projection, index: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Key]:
    """The entries that say so."""
    for hit in hits_of(said.name, index.get(tail_of(said.name), ()), shapes):
        entry = hit.claim.entry
        if (hit.part, hit.tail, entry.layout, entry.source) != ("", 0, said.layout, said.source):
            continue
        if applies(entry, hit.claim.view, dict(hit.numbers)):
            yield hit.claim.record.name, entry.home + entry.name, str(entry.layout), entry.when


def _compared(name: str, said: Projection, seen: Probed | None, keys: tuple[Key, ...], how: str) -> Compared:
    layout = f"{said.layout}  {said.sizes.of(said.layout)}"
    if seen is None or seen.layout is None:
        return Compared(name, layout, "", None, _unseen(name, said.layout) if seen is None else seen.note, keys, "read")
    executed = f"{seen.layout}  {seen.sizes.of(seen.layout)}"
    fault = "" if same_rows(said.layout, said.sizes, seen.layout, seen.sizes) else "the rows differ"
    if not fault and said.rope != seen.rotary and said.kind in ("attention", "mla"):
        fault = f"rotary: the record says {said.rope}, the code does {seen.rotary}"
    return Compared(name, layout, executed, seen.rotary, fault, keys, how)


def _unseen(name: str, layout: Layout) -> str:
    if len(layout.paths) == 1 and len(layout.paths[0].names) == 1:
        return "one part in one role: nothing in it is fused"
    return next((why for ending, why in UNSEEN.items() if re.search(ending, name)), "its rows were not seen to reach an attention")


def same_rows(a: Layout, a_sizes: Mapping[str, int], b: Layout, b_sizes: Mapping[str, int]) -> bool:
    """Whether two sized layouts give every part the same rows, whatever words they have for a part."""
    return _rows(a, a_sizes) == _rows(b, b_sizes)


def _rows(layout: Layout, sizes: Mapping[str, int]) -> dict[str, bytes]:
    return {
        OTHER_NAMES.get(part.path.names[0], part.path.names[0]): np.ascontiguousarray(part.rows().ravel()).tobytes()
        for part in parts(layout, sizes if isinstance(sizes, Sizes) else Sizes(sizes))
    }


# All types, in processes of their own.


def _work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with contextlib.suppress(EOFError):  # nobody asks any more
        while True:
            pipe.send(verdict(pipe.recv()))


class _Worker:
    """A process that answers with verdicts, started anew after one that took too long or died."""

    def __init__(self) -> None:
        self.process: Any = None

    def verdict(self, kind: str) -> Verdict:
        if self.process is None or not self.process.is_alive():
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        start = time.perf_counter()
        self.pipe.send(kind)
        try:
            if self.pipe.poll(LIMIT):
                answer: Verdict = self.pipe.recv()
                return answer
            problem = f"took more than {LIMIT} s"
        except EOFError:
            problem = "the process died"
        self.process.kill()
        self.process.join()
        return Verdict(kind, (), time.perf_counter() - start, problem)


def verdicts(kinds: list[str]) -> list[Verdict]:
    """In the order of `kinds`, a few at a time; each is printed when it is known."""
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for _ in range(WORKERS):
        idle.put(_Worker())

    def one(kind: str) -> Verdict:
        worker = idle.get()
        try:
            answer = worker.verdict(kind)
            print(shown(answer), flush=True)
            return answer
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(one, kinds))


def shown(v: Verdict) -> str:
    lines = [f"{v.name:32} {v.seconds:5.1f} s  {v.how if v.agrees else v.problem or 'not seen, or it differs'}"]
    for c in v.compared:
        lines.append(
            f"    {c.tensor:50} {c.executed or c.declared}  {c.rotary or ''}" + (f"  <- {c.declared}: {c.fault}" if c.fault else "")
        )
    return "\n".join(lines)


# What is written.


def counts(found: list[Verdict]) -> Counter[str]:
    """Models by the weakest way in which a type of theirs is known."""
    models: dict[str, list[str]] = {}
    for v in found:
        models.setdefault(model_of(v.name), []).append(v.how)
    return Counter(next(how for how in ("read", "loaded", "executed") if how in ways) for ways in models.values())


def table(found: list[Verdict], date: str) -> str:
    """docs/families.md."""
    number = counts(found)
    lines = [
        "# Families, as executed",
        "",
        f"Written by `make families` with transformers {transformers.__version__}, {date}.",
        "",
        f"{number['executed']} of {number.total()} types verified by execution, {number['loaded']} through the library's own loader, "
        f"{number['read'] or 'none'} only read.",
        "",
        "A type counts as one with its towers (`qwen2_vl` with `qwen2_vl_vision`), and as what its weakest tower is; each has lines of its "
        "own below.",
        "",
        "- executed: a small model was built and run with labelled rows; they reached the parts, heads and dims that the record says. "
        "Where the whole model cannot be made, its module alone was.",
        "- loaded: the module has no such tensor; a file with labelled rows was written, loaded through transformers' own conversion, "
        "and the rows followed from there.",
        "- read: the record was written from the source; why nothing was run, or what was seen instead, stands beside it.",
        "",
        "| type | tensor | layout | rotary | how verified |",
        "|---|---|---|---|---|",
    ]
    for v in found:
        for one in v.compared:
            how = f"{'differs' if one.executed else 'read'}: {one.fault}" if one.fault else one.how
            if how == "executed" and v.name in MODULES:
                how = "executed, its module alone"
            layout = (one.executed if not one.fault else one.declared).split("  ")[0]
            lines.append("| " + " | ".join(_cell(x) for x in (v.name, f"`{one.tensor}`", f"`{layout}`", one.rotary or "", how)) + " |")
        if not v.compared:
            lines.append(f"| {v.name} | | | | read: {_cell(v.problem)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def verified(found: list[Verdict], date: str) -> dict[str, dict[str, str]]:
    """Record -> tensor -> how and when, where every entry of that name was seen and none differed."""
    ways: dict[Key, set[str]] = {}
    for one in (c for v in found for c in v.compared):
        for key in one.keys:
            ways.setdefault(key, set()).add("differs" if one.fault and one.executed else one.how)
    result: dict[str, dict[str, str]] = {}
    for record in all_records():
        for entry in record.entries:
            same = [
                (record.name, e.home + e.name, str(e.layout), e.when)
                for e in record.entries
                if (e.home, e.name) == (entry.home, entry.name)
            ]
            seen = [ways.get(key, set()) for key in same]
            if all(seen) and all(way & {"executed", "loaded"} and "differs" not in way for way in seen):
                how = "executed" if all("executed" in way for way in seen) else "loaded"
                result.setdefault(record.name, {})[entry.home + entry.name] = f"{how} with transformers {transformers.__version__}, {date}"
    return result


def main(names: list[str]) -> None:
    start = time.perf_counter()
    found = verdicts(names or types())
    print(f"{dict(counts(found))}, {time.perf_counter() - start:.0f} s")
    if not names:
        date = datetime.date.today().isoformat()
        PAGE.write_text(table(found, date), "utf-8")
        lines = (f"{json.dumps(name)}: {json.dumps(tensors, sort_keys=True)}" for name, tensors in sorted(verified(found, date).items()))
        (DATA / "verified.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
