"""The proof of ranks: whole against ranks, ranks against whole, ranks against ranks; errors of files and of the code that divides."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import triptych as tt
from tests import files
from triptych.cli import main
from triptych.errors import FormatError, MismatchError, PlanError, TriptychError

H, D, F, IN, V, TP = 12, 4, 24, 10, 50, 4  # query heads, head dim, MLP width, columns, vocabulary, ranks
LAYER = "model.layers.0."
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def llama(folder: Path, kv: int) -> Path:
    config = {"model_type": "llama", "num_attention_heads": H, "num_key_value_heads": kv, "head_dim": D, "hidden_size": IN, "vocab_size": V}
    made: Shapes = {"model.embed_tokens.weight": ("BF16", (V, IN)), "model.norm.weight": ("F32", (IN,)), "one": ("F32", (1,))}
    made |= {f"{LAYER}self_attn.{part}_proj.{kind}": ("BF16", (heads * D, *((IN,) if kind == "weight" else ())))
             for part, heads in (("q", H), ("k", kv), ("v", kv)) for kind in ("weight", "bias")}  # fmt: skip
    made |= {f"{LAYER}self_attn.o_proj.weight": ("BF16", (IN, H * D)), f"{LAYER}mlp.down_proj.weight": ("BF16", (IN, F))}
    made |= {f"{LAYER}mlp.{part}_proj.weight": ("BF16", (F, IN)) for part in ("gate", "up")}
    files.checkpoint(folder, [made], config)
    return folder


def fused(folder: Path) -> Path:
    """Grouped rows, four kv heads; gate and up in one tensor."""
    config = {"model_type": "phi3", "num_attention_heads": H, "num_key_value_heads": 4, "hidden_size": H * D, "vocab_size": V}
    made: Shapes = {
        f"{LAYER}self_attn.qkv_proj.weight": ("F32", ((H + 8) * D, H * D)),
        f"{LAYER}mlp.gate_up_proj.weight": ("F16", (2 * F, H * D)),
    }
    files.checkpoint(folder / "plain", [made], config)
    tt.convert(folder / "plain", folder / "a", "g (q r|k|v) d")
    return folder / "a"


def rank(out: Path, number: int, of: int = TP) -> Path:
    return out / f"rank-{number}-of-{of}"


def flip(path: Path, name: str, byte: int) -> None:
    """One bit of one tensor of a safetensors file."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + json.loads(content[8:start])[name]["data_offsets"][0] + byte] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("kv", "policy"), [(4, "replicate"), (2, "replicate"), (1, "rows"), (2, "rows")])
def test_divided_joined_and_divided_anew(tmp_path: Path, kv: int, policy: str) -> None:
    whole = llama(tmp_path / "a", kv)
    tt.shard(whole, tmp_path / "b", TP, kv=policy, pad_vocab_to=24)
    proof = tt.verify(whole, tmp_path / "b")
    assert (proof.projections, proof.tensors) == (6, 7) and proof.rows >= 2 * (H + 2 * kv) * D and proof.notes == ()
    tt.merge(tmp_path / "b", tmp_path / "c")
    assert tt.verify(tmp_path / "b", tmp_path / "c").tensors == 7
    tt.verify(whole, tmp_path / "c")
    tt.shard(tmp_path / "b", tmp_path / "d", 2)
    tt.verify(tmp_path / "b", tmp_path / "d")
    tt.verify(whole, tmp_path / "d")
    tt.verify(tmp_path / "d", tmp_path / "b")


def test_grouped_rows_and_gates(tmp_path: Path) -> None:
    whole = fused(tmp_path)
    tt.shard(whole, tmp_path / "b", TP)
    assert tt.verify(whole, tmp_path / "b").rows == (H + 8) * D
    for wrong in ("(q h|k g|v g) d", "g (q r|v|k) d"):
        (tmp_path / wrong[:2]).mkdir()
        shutil.copytree(tmp_path / "b", tmp_path / wrong[:2] / "b")
        for path in (tmp_path / wrong[:2] / "b").glob("*/triptych-shard.json"):
            path.write_text(path.read_text().replace('"layout":"g (q r|k|v) d"', f'"layout":"{wrong}"'))
        with pytest.raises(TriptychError, match=r"different layouts|does not say what it must hold"):
            tt.verify(whole, tmp_path / wrong[:2] / "b")


def test_every_tensor_of_every_rank_counts(tmp_path: Path) -> None:
    whole = llama(tmp_path / "a", 2)
    out, joined = tmp_path / "b", tmp_path / "c"
    tt.shard(whole, out, TP, pad_vocab_to=24)
    tt.merge(out, joined)
    for number in range(TP):
        path = rank(out, number) / "model.safetensors"
        kept = path.read_bytes()
        for name, data in files.read(rank(out, number)).items():
            flip(path, name, len(data) - 1)
            for one, two in ((whole, out), (out, joined)):
                with pytest.raises(MismatchError) as caught:
                    tt.verify(one, two)
                if (one, two) == (whole, out) and "k_proj" in name:
                    label = f"part k, head {number // 2}, dim {D - 1}"
                    assert label in str(caught.value.fields["where"]) and f"rank-{number}-of-4" in str(caught.value.fields["where"])
            path.write_bytes(kept)
        tt.verify(whole, out)
    flip(joined / "model.safetensors", "model.norm.weight", 5)
    with pytest.raises(MismatchError, match="should be unchanged"):
        tt.verify(out, joined)


def _exchanged(out: Path) -> None:
    one, two = (rank(out, number) / "model.safetensors" for number in (1, 2))
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def _table(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def does(out: Path) -> None:
        for path in out.glob("*/triptych-shard.json"):
            table = json.loads(path.read_text())
            change(table)
            path.write_text(json.dumps(table))

    return does


def _restamped(out: Path) -> None:
    path = rank(out, 0) / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"]["triptych"] = header["__metadata__"]["triptych"].replace("(q h d)", "(q d h)")
    files.raw(path, header, content[start:])


def _nested(table: dict[str, Any]) -> None:
    table["cuts"][0]["sizes"] = {"h": {"h": [1]}}


WRONG: list[tuple[Callable[[Path], None], str]] = [
    (_exchanged, "is not the row of the input"),
    (_restamped, "does not say what it must hold"),
    (_table(lambda table: table.update(kv="rows")), "another number of rows|does not say|cannot be shared"),
    (_table(lambda table: table["cuts"][0].update(sizes={"h": 1 << 40, "d": 1 << 40})), "damaged"),
    (_table(lambda table: table["cuts"][0].update(layout="(" * 50)), "damaged"),
    (_table(lambda table: table["cuts"][0].update(axis=9)), "damaged"),
    (_table(_nested), "damaged"),
    (_table(lambda table: table.update(cuts={"a": 1})), "damaged"),
    (_table(lambda table: table["tensors"].clear()), "damaged"),
    (_table(lambda table: table.update(tensors=dict.fromkeys(table["tensors"], 99))), "damaged"),
    (_table(lambda table: table.update(pad=0)), "damaged"),
    (_table(lambda table: table.update(world=3)), "tables of the ranks differ"),
    (lambda out: (rank(out, 3) / "triptych-shard.json").unlink(), "not complete"),
    (lambda out: shutil.rmtree(rank(out, 1)), "not complete"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_folders_are_found(tmp_path: Path, number: int) -> None:
    whole = llama(tmp_path / "a", 2)
    tt.shard(whole, tmp_path / "b", TP, pad_vocab_to=24)
    change, match = WRONG[number]
    change(tmp_path / "b")
    with pytest.raises((MismatchError, FormatError), match=match):
        tt.verify(whole, tmp_path / "b")


def _turn(right: Any) -> Any:
    """Ranks share kv heads in turn, not one after the other."""

    def held(cut: Any, ranks: Any, number: int) -> Any:
        groups = cut.sizes.get("g", ranks.world) if cut.role == "heads" else ranks.world
        return right(cut, ranks, number if groups >= ranks.world else number % groups * (ranks.world // groups) + number // groups)

    return held


def _reverse(right: Any) -> Any:
    return lambda cut, ranks, number: right(cut, ranks, ranks.world - 1 - number if cut.role == "even" else number)


def _upside_down(right: Any) -> Any:
    return lambda cut, ranks, number: (
        right(cut, ranks, number)[::-1] if cut.role == "heads" and ranks.world > 1 else right(cut, ranks, number)
    )


@pytest.mark.parametrize("bug", [_turn, _reverse, _upside_down])
def test_errors_of_the_code_that_divides_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    """Dividing and joining back gives the same bytes with each of these; the proof of the ranks does not."""
    whole = llama(tmp_path / "a", 2)
    sharding, shard_plan = (importlib.import_module(f"triptych.{name}") for name in ("sharding", "shard_plan"))

    def forget() -> None:
        sharding.passage.cache_clear()
        shard_plan._moved.cache_clear()

    forget()
    monkeypatch.setattr(sharding, "held", bug(sharding.held))
    tt.shard(whole, tmp_path / "b", TP, pad_vocab_to=24)
    tt.merge(tmp_path / "b", tmp_path / "c")
    forget()
    assert files.read(tmp_path / "c") == files.read(whole), "a round trip sees nothing"
    tt.verify(whole, tmp_path / "c")
    with pytest.raises(MismatchError, match="is not the row of the input"):
        tt.verify(whole, tmp_path / "b")
    with pytest.raises(MismatchError):
        tt.verify(tmp_path / "b", tmp_path / "c")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = llama(tmp_path / "a", 2)
    tt.shard(whole, tmp_path / "b", TP, pad_vocab_to=24)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([*map(str, arguments)])
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    code, told, _ = run("verify", whole, tmp_path / "b")
    assert code == 0 and "rows of 6 projections compared by label, 7 other tensors byte for byte" in told
    assert run("verify", whole, tmp_path / "b", "--rope", "half")[0] == 4
    code, _, told = run("verify", whole, tmp_path / "b", "--certificate", tmp_path / "c.json")
    assert code == 4 and "merge them" in told and not (tmp_path / "c.json").exists()
    (rank(tmp_path / "b", 2) / "config.json").write_text("{}")
    assert "not the same in the output: config.json" in run("verify", whole, tmp_path / "b")[1]
    with pytest.raises(PlanError, match="nothing else can be asked"):
        tt.verify(tmp_path / "b", whole, "split")
