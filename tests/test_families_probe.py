"""The table against the code: small models of the most different families are run and compared with their records."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.families_report import Verdict, same_rows, types, verdict
from triptych.layout import Layout
from triptych.sizes import bind

SPREAD = [
    "gpt2",
    "imagegpt",
    "decision_transformer",
    "openai-gpt",
    "gpt_neox",
    "gpt_neox_japanese",
    "bloom",
    "persimmon",
    "falcon",
    "codegen",
    "mpt",
    "dbrx",
    "gpt_bigcode",
    "phi3",
    "modernbert",
    "minimax",
    "deberta",
    "blip_vision_model",
    "blip_2_vision_model",
    "sam_vision_model",
    "vitdet",
    "levit",
    "florence_vision",
    "exaone4_5_vision",
    "qwen2_vl_vision",
    "deepseek_v3",
    "mistral4",
    "qwen3_next",
    "qwen3_5_text",
    "mamba",
    "mamba2",
    "jetmoe",
    "siglip_vision_model",
    "aria",
    "focalnet",
    "mobilevitv2",
    "pp_doclayout_v3",
    "layoutlmv2",
    "xlstm",
    "rf_detr",
]


def test_the_spread_is_wide() -> None:
    assert len(SPREAD) >= 30 and set(SPREAD) <= set(types())


@pytest.mark.parametrize("kind", SPREAD)
def test_the_record_says_what_the_code_does(kind: str) -> None:
    seen: Verdict = verdict(kind)
    assert seen.agrees, seen.problem or [one for one in seen.compared if one.fault]


def test_a_wrong_record_would_be_seen() -> None:
    sizes = bind("h (q|k|v) d", h=3, d=8)
    assert same_rows(Layout("h (q|k|v) d"), sizes, Layout("g (q r|k|v) d"), bind("g (q r|k|v) d", h=3, g=3, d=8))
    for wrong in ("(q|k|v) h d", "h (q|v|k) d", "h d (q|k|v)"):
        assert not same_rows(Layout("h (q|k|v) d"), sizes, Layout(wrong), sizes)
