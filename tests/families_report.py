"""The proof of the table: a small model of every family that transformers can build is probed and compared with its record.

`python -m tests.families_report [TYPE ...]` prints a line a type; without types it writes docs/families.md.
"""

from __future__ import annotations

import datetime
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from triptych.errors import TriptychError
from triptych.families import all_records
from triptych.families.declare import Projection, declared
from triptych.layout import Layout
from triptych.live.probe import Probed, smallest
from triptych.rowmap import parts
from triptych.sizes import Sizes

ROOT = Path(__file__).parent.parent
OTHER_NAMES = {"gate": "z", "in_gate": "z", "k_nope": "k", "k_rope": "rope", "q_nope": "nope", "q_rope": "rope", "kv_latent": "latent"}
"""Part names that say the same; the probe knows no family's words."""


CONFIGS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 1408},
}
"""For types whose default config no model can be made of."""


@dataclass(frozen=True)
class Compared:
    """One projection of a type: what the record says, what was executed, and `fault` when they differ."""

    tensor: str
    declared: str
    executed: str
    rotary: str | None
    fault: str


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


def types() -> list[str]:
    """Every model type with a fused attention, MLA or linear-attention tensor of its own that transformers knows."""
    known = {
        kind for record in all_records() for kind in record.types if any(entry.on_disk and entry.kind != "mlp" for entry in record.entries)
    }
    return sorted(kind for kind in known if kind in transformers.CONFIG_MAPPING)


def verdict(kind: str) -> Verdict:
    """Builds, probes and compares one type."""
    start = time.perf_counter()
    try:
        model, found = smallest(transformers.AutoConfig.for_model(kind, **CONFIGS.get(kind, {})), **_unequal(kind))
    except Exception:  # not every model can have fewer kv heads
        try:
            model, found = smallest(transformers.AutoConfig.for_model(kind, **CONFIGS.get(kind, {})))
        except TriptychError as error:
            return Verdict(kind, (), time.perf_counter() - start, " ".join(str(error.fields.get("found") or error).split())[:160])
        except Exception as error:  # a config class that cannot be made
            return Verdict(kind, (), time.perf_counter() - start, f"{type(error).__name__}: {error}"[:160])
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    said = declared(model.config.to_dict(), shapes)
    fused = {p.name.removesuffix(".weight"): p for p in said.projections if p.fused and not p.name.endswith("bias")}
    compared = {}
    for name, projection in fused.items():
        seen = found.get(name)
        if seen is not None or projection.kind != "mlp":
            one = _compared(name, projection, seen)
            compared.setdefault((re.sub(r"\d+", "{L}", name), one.executed, one.fault), one)
    problem = "" if compared else "the record names no fused tensor of this model"
    return Verdict(kind, tuple(compared.values()), time.perf_counter() - start, problem)


def _unequal(kind: str) -> dict[str, Any]:
    """Fewer kv heads than heads where a config has both and they are equal, so that a record which mixes them up shows it."""
    try:
        config = transformers.CONFIG_MAPPING[kind]()
    except Exception:  # what cannot be made is told by `smallest`
        return {}
    heads, kv = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and heads == kv and heads % 4 == 0 and getattr(config, "kv_lora_rank", None) is None:
        return {"num_key_value_heads": heads // 4}
    return {}


def _compared(name: str, said: Projection, seen: Probed | None) -> Compared:
    layout = f"{said.layout}  {said.sizes.of(said.layout)}"
    if seen is None or seen.layout is None:
        return Compared(name, layout, "", None, "not executed" if seen is None else seen.note)
    executed = f"{seen.layout}  {seen.sizes.of(seen.layout)}"
    fault = "" if same_rows(said.layout, said.sizes, seen.layout, seen.sizes) else "the rows differ"
    if not fault and said.rope != seen.rotary and said.kind in ("attention", "mla"):
        fault = f"rotary: the record says {said.rope}, the code does {seen.rotary}"
    return Compared(name, layout, executed, seen.rotary, fault)


def same_rows(a: Layout, a_sizes: Mapping[str, int], b: Layout, b_sizes: Mapping[str, int]) -> bool:
    """Whether two sized layouts give every part the same rows, whatever words they have for a part."""
    return _rows(a, a_sizes) == _rows(b, b_sizes)


def _rows(layout: Layout, sizes: Mapping[str, int]) -> dict[str, bytes]:
    return {
        OTHER_NAMES.get(part.path.names[0], part.path.names[0]): np.ascontiguousarray(part.rows().ravel()).tobytes()
        for part in parts(layout, sizes if isinstance(sizes, Sizes) else Sizes(sizes))
    }


def table(verdicts: list[Verdict]) -> str:
    """docs/families.md."""
    executed = [v for v in verdicts if v.agrees]
    lines = [
        "# Families, as executed",
        "",
        f"A small model of each type was built with transformers {transformers.__version__}, run, and compared with its record "
        f"({datetime.date.today().isoformat()}, `make families`).",
        f"{len(executed)} of {len(verdicts)} types agree with their record in every fused tensor that ran.",
        "",
        "| type | tensor | layout | rotary | how verified |",
        "|---|---|---|---|---|",
    ]
    for v in verdicts:
        for one in v.compared:
            how = one.fault or "executed"
            cell = (one.executed or one.declared).split("  ")[0].replace("|", "\\|")
            lines.append(f"| {v.name} | `{one.tensor}` | `{cell}` | {one.rotary or ''} | {how} |")
        if v.problem:
            lines.append(f"| {v.name} | | | | not executed: {v.problem.replace('|', ' ')} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    verdicts = []
    for kind in names or types():
        verdicts.append(one := verdict(kind))
        print(f"{one.name:32} {one.seconds:5.1f} s  {'agrees' if one.agrees else one.problem or 'DIFFERS'}", flush=True)
        for c in one.compared:
            print(
                f"    {c.tensor:50} {c.executed or c.declared}  {c.rotary or ''}" + (f"  <- {c.declared}: {c.fault}" if c.fault else ""),
                flush=True,
            )
    if not names:
        (ROOT / "docs" / "families.md").write_text(table(verdicts), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
