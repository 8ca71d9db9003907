"""The table of families: formulae, soundness of every record, coverage, record files of users, listings."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from triptych import families
from triptych.errors import FormatError, TriptychError
from triptych.families import declared, formula, load_records, lookup, records, refresh, show
from triptych.families.config import View

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

GOOD = '[[family]]\ntypes = ["t"]\nsource = "s"\n[[family.tensor]]\nfused = "qkv"\nlayout = "(q|k|v) h d"\n'
H, G, D = 6, 2, 10  # query heads, kv heads, head dim: pairwise different, and different from their ratio 3


# Formulae.

CONFIG = {"a": 12, "b": 5, "zero": 0, "none": None, "f": 2.5, "text": "full", "list": [3, 7], "sub": {"x": 4}, "flag": True}


def _names(name):
    value = CONFIG
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return formula.Missing(name)
        value = value[key]
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a / 3", 4),
        ("a // b", 2),
        ("a % b", 2),
        ("a * b - 1 + 2", 61),
        ("none or a", 12),
        ("missing or b", 5),
        ("zero or sub.x", 4),
        ("-b", -5),
        ("list[1]", 7),
        ("a if flag else b", 12),
        ("a if not flag else b", 5),
        ("text == 'full'", True),
        ("text in ['x', 'full']", True),
        ("a > b", True),
        ("missing == None", True),
        ("int(f * 2)", 5),
        ("ceil(f)", 3),
        ("min(a, b)", 5),
        ("max(a, b)", 12),
        ("round_up(a, b)", 15),
        ("stage(5, list)", 1),
        ("missing.deep or 1", 1),
        ("flag and a", 12),
        ("text is not None", True),
    ],
)
def test_formulae(text, value):
    assert formula.evaluate(text, _names) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a / b", "a quotient of config values has a rest"),
        ("a / zero", "must not be zero"),
        ("missing + 1", "the config has no 'missing'"),
        ("missing", "the config has no 'missing'"),
        ("text + 1", "must be a number"),
        ("flag + 1", "must be a number"),
        ("a ** b", "only + - *"),
        ("a * 10000000000000 * a", "out of bounds"),
        ("list[2]", "lacks this entry"),
        ("a[0]", "lacks this entry"),
        ("a < text", "cannot be compared"),
        ("__import__('os')", "holds only"),
        ("a.__class__()", "holds only"),
        ("(lambda: 1)()", "holds only"),
        ("[x for x in list]", "holds only"),
        ("a +", "not a formula"),
        ("", "not a formula"),
        ("1" * 500, "too long"),
        ("((((" * 200, "too long"),
        ("f'{a}'", "holds only"),
        ("stage(99, list)", "lacks this entry"),
        ("stage(1, a)", "a list is needed"),
        ("min(a)", "takes 2 values"),
        ("round_up(a, zero)", "must be positive"),
        ("list + 1", "must be a number"),
        ("-" * 399 + "1", "nested too deeply"),
        ("round_up(1, 1e-320)", "out of bounds"),
    ],
)
def test_formulae_that_fail_say_why(text, says):
    with pytest.raises(FormatError, match=re.escape(says)):
        formula.evaluate(text, _names)


@pytest.mark.filterwarnings("error")
def test_a_formula_makes_python_say_nothing_of_its_own():
    assert formula.evaluate("1or 7", _names) == 1


# The table itself.


def test_every_record_is_sound():
    seen = set()
    for record in families.all_records():
        assert record.source and re.match(r"[^:]+(==|@)[^:]+:", record.source), record.name
        assert re.fullmatch(r"2026-\d\d-\d\d", record.checked), record.name
        for entry in record.entries:
            key = (
                record.types,
                entry.home,
                entry.name,
                str(entry.layout),
                entry.when,
                entry.axis,
                entry.tails,
                entry.beside,
                entry.on_disk,
                entry.sizes,  # of those that differ in nothing else the shapes choose
            )
            assert key not in seen, key
            seen.add(key)
            assert entry.rope in (None, "half", "interleaved") or " if " in entry.rope
            names = [entry.name] * entry.on_disk + [name for _, name in dict(entry.parts).items()]
            assert len(set(names)) == len(names) or "=" in str(entry.layout), (record.name, names)
            for text in (entry.when, entry.rotary, *(text for _, text in entry.sizes)):
                assert not text or formula.keys(text) is not None
            allowed = {"h", "g", "r", "d", "t", "n", "m", *entry.layout.axes}
            assert {axis for axis, _ in entry.sizes} <= allowed, (record.name, entry.name)


def test_split_names_of_one_family_do_not_meet():
    for record in families.all_records():
        made: dict[tuple[str, str], str] = {}
        if record.name in ("axk2", "diffusers", "litgpt", "transformer-engine"):  # these never stand side by side
            continue
        for entry in record.entries:
            for _, part in entry.parts if entry.on_disk else ():
                assert made.setdefault((entry.home, part), entry.name) == entry.name, (record.name, part)


CENSUS = [
    kind
    for line in (
        "aria axk1 axk2 bailing_hybrid bamba bark blip blip-2 bloom bridgetower codegen cohere_compass dbrx deberta",
        "decision_transformer deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots3_note ernie4_5_vl_moe esm",
        "evolla exaone4_5 falcon falcon_h1 falcon_mamba florence2 focalnet gemma4 glm4_moe_lite glm4v glm4v_moe glm5_next",
        "glm_image glm_moe_dsa glm_ocr got_ocr2 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese granite_speech granite_speech_plus",
        "granitemoehybrid hiera hy_v4 idefics2 imagegpt instructblip instructblipvideo jamba jetmoe kimi_k25 kimi_linear",
        "layoutlmv2 levit lfm2 lfm2_moe lfm3 lfm3_vl longcat_flash mamba mamba2 mask2former mgp-str minicpm3 minimax mistral4",
        "mistral_large4 mobilevitv2 modernbert mpt nemotron_h olmo_hybrid oneformer openai-gpt persimmon phi3 phi4_multimodal",
        "pp_doclayout_v2 pp_doclayout_v3 pp_formulanet pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_small_rec qwen2_5_vl",
        "qwen2_vl qwen3_5 qwen3_5_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp reformer sam sam2 sam_hq",
        "seggpt siglip siglip2 slanext timesformer unlimited_ocr vitdet xlstm youtu zamba zamba2 zaya",
        "radio hrm_text molmo2 step3p7 rf_detr nomic_bert gte jina_embeddings_v3 qianfan_ocr tipsv2 gradium_phonon_tts",
        "nemo_speechlm",
    )
    for kind in line.split()
]


def test_the_census_is_covered():
    assert len(CENSUS) == len(set(CENSUS)) == 124
    for kind in CENSUS:
        assert show(kind), kind


def test_defaults_are_those_of_the_installed_transformers():
    stored = json.loads(refresh.PATH.read_text("utf-8"))
    if stored["package"] != f"transformers=={transformers.__version__}":
        pytest.fail(f"written with {stored['package']}: python -m triptych.families.refresh")
    assert stored == json.loads(json.dumps(refresh.defaults()))


TINY = {
    "persimmon": {"num_hidden_layers": 1, "hidden_size": 60, "num_attention_heads": 6, "vocab_size": 50, "intermediate_size": 8},
    "minimax": {
        "num_hidden_layers": 2,
        "hidden_size": 60,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 8,
    },
    "deepseek_v3": {
        "num_hidden_layers": 2,
        "hidden_size": 60,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "first_k_dense_replace": 1,
    },
    "qwen3_next": {"num_hidden_layers": 4, "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "num_experts": 2},
    "mamba2": {"num_hidden_layers": 1},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "levit": {},
    "mobilevitv2": {},
    "sam_vision_model": {"num_hidden_layers": 1},
    "hiera": {"depths": [1, 1, 1, 1]},
    "qwen2_vl_vision": {"depth": 1},
    "deberta": {"num_hidden_layers": 1},
    "xlstm": {"num_blocks": 1, "weight_mode": "fused"},
    "esm": {"num_hidden_layers": 1, "is_folding_model": True, "vocab_size": 33},
    "gpt_oss": {"num_hidden_layers": 1, "num_local_experts": 2},
}


CLASSES = {
    "esm": ("esm.modeling_esmfold", "EsmForProteinFolding"),
    "qwen2_vl_vision": ("qwen2_vl.modeling_qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
    "sam_vision_model": ("sam.modeling_sam", "SamVisionModel"),
}


@pytest.mark.parametrize("kind", TINY)
def test_every_tensor_of_a_model_that_looks_fused_is_told(kind):
    config = transformers.CONFIG_MAPPING[kind](**TINY[kind])
    place, name = CLASSES.get(kind, ("", ""))
    cls = getattr(importlib.import_module(f"transformers.models.{place}"), name) if name else transformers.AutoModel.from_config
    with torch.device("meta"):
        model = cls(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    stored = {**json.loads(json.dumps(config.to_diff_dict(), default=str)), "model_type": kind}
    said = declared(stored, shapes)
    assert said.doubts == () and said.projections
    told = {p.name for p in said.projections if p.fused}
    assert {key for key in shapes if set(key.split(".")[-2:]) & families.LOOKS_FUSED} <= told


# User records.

DOC = Path(__file__).parents[1] / "docs/add-a-family.md"


def _documented(tmp_path):
    text = re.search(r"```toml\n(.*?)```", DOC.read_text("utf-8"), re.DOTALL)[1]
    assert len(text.splitlines()) <= 20
    path = tmp_path / "my_decoder.toml"
    path.write_text(text)
    return path


def test_the_documented_record_works(tmp_path):
    mine = load_records(_documented(tmp_path))
    shapes = {
        "model.layers.0.attn.qkv.weight": (100, 60),
        "model.layers.0.attn.qkv.bias": (100,),
        "model.layers.0.mlp.gate_up.weight": (34, 60),
    }
    said = declared({"model_type": "my_decoder", "n_heads": H, "n_kv_heads": G, "dim": H * D}, shapes, mine)
    assert said.family == "my_decoder" and said.doubts == ()
    assert [(str(p.layout), p.sizes.of(p.layout)) for p in said.projections] == [("(q h|k g|v g) d", "h=6 d=10 g=2")] * 2 + [
        ("(gate|up) f", "f=17")
    ]
    assert said.projections[0].source == "my_package==1.0:my_package/model.py:40-66"


def test_user_records_are_asked_first(tmp_path):
    path = tmp_path / "f.toml"
    path.write_text(
        GOOD.replace('"t"', '"gpt2"').replace("qkv", "c_attn").replace("(q|k|v) h", "h (q|k|v)") + 'axis = 1\nsizes = {h = "n_head"}'
    )
    shapes = {"h.0.attn.c_attn.weight": (60, 180)}
    assert (
        str(declared({"model_type": "gpt2", "n_head": 6, "n_embd": 60}, shapes, load_records(path)).projections[0].layout) == "h (q|k|v) d"
    )
    assert str(declared({"model_type": "gpt2", "n_head": 6, "n_embd": 60}, shapes).projections[0].layout) == "(q|k|v) h d"


@pytest.fixture
def offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs a package that offers the records of the docs through one of its functions."""
    path = _documented(tmp_path)
    (tmp_path / "offers.py").write_text(f"def path():\n    return {str(path)!r}\n\ndef broken():\n    raise KeyError('gone')\n")
    (tmp_path / "offers-1.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    def installed(function: str) -> None:
        (tmp_path / "offers-1.dist-info" / "entry_points.txt").write_text(f"[{records.GROUP}]\nmine = offers:{function}\n")
        records.entry_point_records.cache_clear()

    yield installed
    monkeypatch.undo()
    records.entry_point_records.cache_clear()


def test_an_entry_point_offers_records(offers: Callable[[str], None]) -> None:
    offers("path")
    assert declared({"model_type": "my_decoder", "n_heads": 6, "dim": 60}, {"layers.0.attn.qkv.weight": (180, 60)}).projections
    offers("broken")
    with pytest.raises(FormatError, match=r"entry point of triptych\.families fails"):
        declared({}, {})


@pytest.mark.parametrize("finder", [False, True])
def test_entry_points_that_no_folder_shows_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finder: bool) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "nowhere")])
    assert not records._may_be_offered()
    if finder:
        monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_distributions=None)])
    else:
        (tmp_path / "packages.zip").write_bytes(b"")
        monkeypatch.setattr(sys, "path", [str(tmp_path / "packages.zip")])
    assert records._may_be_offered()


def test_without_an_offer_no_metadata_are_read() -> None:
    """They take longer to load than all else that `inspect` needs."""
    code = "import sys, triptych.families.records as r; r.entry_point_records(); print('importlib.metadata' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[family", "is not TOML"),
        ("a = 1", r"holds \[\[family\]\] tables"),
        (GOOD.replace("source", "sauce"), "no key 'sauce'"),
        (GOOD.replace('source = "s"\n', ""), "needs a source"),
        (GOOD.replace('["t"]', "3"), "'types' of a record has the wrong type"),
        (GOOD.replace('["t"]', "[3]"), "'types' is a list of names"),
        (GOOD.replace("(q|k|v) h d", "(q|k|v h d"), "layout is none"),
        (GOOD.replace("fused", "join"), "names one tensor for each part"),
        (GOOD + 'join = "x"\n', "either `fused`"),
        (GOOD + 'parts = {z = "z"}\n', "a part that the layout lacks"),
        (GOOD + 'kind = "odd"\n', "one of these kinds"),
        (GOOD + "axis = true\n", "'axis' of a record has the wrong type"),
        (GOOD.replace("types", 'like = "none"\ntypes'), "like a template that stands nowhere above"),
        (GOOD.split("[[family.tensor")[0], "at least one"),
        (GOOD.replace('fused = "', 'fused = "{L}.{L}.'), "at most one {L}"),
        (GOOD.replace('fused = "', 'fused = "*****.'), "a whole component"),
    ],
)
def test_record_files_that_are_none_say_why(tmp_path, text, says):
    path = tmp_path / "f.toml"
    path.write_text(text)
    with pytest.raises(FormatError, match=says):
        load_records(path)


def test_a_record_file_that_is_not_there_or_too_large(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        load_records(tmp_path / "none.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * (records.MAX_FILE + 1))
    with pytest.raises(FormatError, match="too large"):
        load_records(tmp_path / "big.toml")


# For people.


def test_show_gives_formulae_or_numbers():
    (row,) = show("phi3")[:1]
    assert (
        row["sizes"]
        == "h = num_attention_heads, g = num_key_value_heads or num_attention_heads, d = head_dim or hidden_size / num_attention_heads"
    )
    assert row["source"].startswith("transformers==") and row["layout"] == "(q h|k g|v g) d"
    rows = show("falcon", {"hidden_size": 60, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True})
    assert (rows[0]["applies"], rows[0]["sizes"]) == (True, "g=2 r=3 d=10")
    assert [row["applies"] for row in rows] == [True, False, False]
    assert {row["family"] for row in show("qwen2_vl")} == {"qwen2_vl_vision"}
    with pytest.raises(FormatError, match="unknown family"):
        show("gpt9000")


def test_what_was_executed_is_said_and_the_rest_is_read():
    said = {(record.name, entry.verified) for record in families.all_records() for entry in record.entries if entry.verified != "read"}
    assert {"bloom", "codegen", "dbrx", "gpt2", "gpt_neox", "mpt", "phi3", "radio"} <= {name for name, _ in said}
    assert all(re.fullmatch(r"(executed|loaded) with \S+ [\d.]+, \d{4}-\d\d-\d\d", how) for _, how in said)
    stored = json.loads((records.DATA / "verified.json").read_text("utf-8"))
    known = {(record.name, entry.home + entry.name) for record in families.all_records() for entry in record.entries}
    assert {(name, tensor) for name, tensors in stored.items() for tensor in tensors} <= known


def test_families_lists_every_record():
    rows = families.families()
    assert len(rows) == len(families.all_records()) and json.dumps(rows)
    assert {"transformers", "Megatron-LM", "TransformerEngine", "litgpt", "torch"} <= {row["ecosystem"] for row in rows}


def test_lookup_reads_a_type_out_of_a_list_or_a_table():
    assert str(lookup("RefinedWeb")[0].entries[0].layout) == "g (q r|k|v) d"
    assert lookup("radio")[0].entries[0].name == "qkv" and lookup("no such") == ()


def test_a_view_reads_aliases_before_defaults():
    assert View({"n_head": 3}, "gpt2").get("num_attention_heads") == 3
    assert View({}, "gpt2").get("num_attention_heads") == 12
    assert isinstance(View({}, "gpt2").get("nothing.at.all"), formula.Missing)
    with pytest.raises(TriptychError, match="where a table is needed"):
        View({"attn_config": 3}, "dbrx").get("attn_config.kv_n_heads")
