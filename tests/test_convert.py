"""Conversions, bit for bit, against slicing by hand, against view and permute, and against transformers' own forward pass."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import triptych as tt
from tests import files
from triptych import mover, run
from triptych.errors import FormatError, OutputError, PlanError
from triptych.mover import Mover
from triptych.steps import Feed, Nest, Step

H, G, D, IN = 6, 2, 4, 10  # query heads, kv heads, head dim, columns: all different
NEOX = {"model_type": "gpt_neox", "hidden_size": H * D, "num_attention_heads": H}
QKV = "gpt_neox.layers.{}.attention.query_key_value.{}"


def labelled(text: str, **sizes: int) -> list[tuple[str, int, int]]:
    return [tuple(row) for row in tt.Layout(text).rows(**sizes)]


def moved(data: bytes, before: str, after: str, **sizes: int) -> bytes:
    """The rows of a tensor put where the slow listing of the other layout wants them."""
    where = dict(zip(labelled(before, **sizes), files.rows(data, len(labelled(before, **sizes))), strict=True))
    return b"".join(where[label] for label in labelled(after, **sizes))


LAYOUTS = ["h (q|k|v) d", "(q|k|v) h d", "h d (q|k|v)", "(q|k|v) d h", "(v|q|k) h d", "t n (q|k|v) d", "h (q|k|v) p c"]


@pytest.mark.parametrize("after", LAYOUTS[:5])
def test_every_pair(tmp_path: Path, after: str) -> None:
    sizes = {"t": 2, "n": 3, "h": 6, "d": 4, "p": 2, "c": 2}
    made: dict[str, tuple[str, tuple[int, ...]]] = {"y": ("F32", (3,))}
    for number in range(len(LAYOUTS)):
        made |= {f"l{number}.weight": ("BF16", (72, IN)), f"l{number}.bias": ("BF16", (72,))}
    parts = files.checkpoint(tmp_path / "a", [made])
    given = {f"l{number}.*": before for number, before in enumerate(LAYOUTS)}
    done = tt.convert(tmp_path / "a", tmp_path / "b", after, layouts=given, **sizes)
    found = files.read(tmp_path / "b")
    assert found["y"] == parts["y"] and set(found) == set(parts)
    for number, before in enumerate(LAYOUTS):
        for name in (f"l{number}.weight", f"l{number}.bias"):
            assert found[name] == moved(parts[name], before, after, **sizes)
    assert done.size == sum(len(data) for data in files.snapshot(tmp_path / "b").values())


GROUPED = ["(q h|k g|v g) d", "g (q r|k|v) d", "(q r g|k g|v g) d", "g d (q r|k|v)", "(q g r|k g|v g) p c"]


@pytest.mark.parametrize("after", GROUPED)
def test_grouped_heads_along_the_last_axis(tmp_path: Path, after: str) -> None:
    """A weight stored [in, out]: the columns move, in tiles."""
    sizes = {"h": 6, "g": 2, "d": 4}
    made: dict[str, tuple[str, tuple[int, ...]]] = {}
    for number in range(len(GROUPED)):
        made |= {f"l{number}.weight": ("BF16", (13, 40)), f"l{number}.bias": ("BF16", (40,))}
    parts = files.checkpoint(tmp_path / "a", [made])
    given = {f"l{n}.weight": f"{before} @ 1" for n, before in enumerate(GROUPED)} | {
        f"l{n}.bias": before for n, before in enumerate(GROUPED)
    }
    tt.convert(tmp_path / "a", tmp_path / "b", after, layouts=given, **sizes)
    found = files.read(tmp_path / "b")
    for n, before in enumerate(GROUPED):
        assert found[f"l{n}.bias"] == moved(parts[f"l{n}.bias"], before, after, **sizes)
        weight = files.rows(parts[f"l{n}.weight"], 13)
        assert files.rows(found[f"l{n}.weight"], 13) == [moved(row, before, after, **sizes) for row in weight]


def test_dtypes_are_only_bytes(tmp_path: Path) -> None:
    made = {f"{dtype}.weight": (dtype, (36, 8)) for dtype in files.BITS}
    parts = files.checkpoint(tmp_path / "a", [made])
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d", layouts={"*": "h (q|k|v) d @ 0"}, h=3)
    found = files.read(tmp_path / "b")
    assert all(found[name] == moved(parts[name], "h (q|k|v) d", "(q|k|v) h d", h=3, d=4) for name in made)


def test_rows_that_begin_inside_a_byte_are_refused(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", [{"w.weight": ("F4", (36, 3))}])
    with pytest.raises(PlanError, match="whole bytes"):
        tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d", layouts={"w.weight": "h (q|k|v) d"}, h=3)


def test_tensors_of_no_size_and_of_no_dims(tmp_path: Path) -> None:
    made = {"w.weight": ("F32", (36, 0)), "w.bias": ("F32", (36,)), "scalar": ("F64", ()), "none": ("BF16", (0, 3)), "odd": ("U8", (7,))}
    parts = files.checkpoint(tmp_path / "a", [made])
    tt.convert(tmp_path / "a", tmp_path / "b", "split", layouts={"w.*": "h (q|k|v) d"}, h=3)
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert found["q_proj.weight"].shape == (12, 0) and found["none"].shape == (0, 3) and found["scalar"].shape == ()
    assert files.read(tmp_path / "b")["odd"] == parts["odd"]


def test_three_dims_with_the_packed_axis_in_the_middle(tmp_path: Path) -> None:
    """Experts [E, 2 i, in]."""
    parts = files.checkpoint(tmp_path / "a", [{"e": ("BF16", (3, 14, 5))}])
    tt.convert(tmp_path / "a", tmp_path / "b", "f (gate|up)", layouts={"e": "(up|gate) f @ 1"})
    want = [moved(expert, "(up|gate) f", "f (gate|up)", f=7) for expert in files.rows(parts["e"], 3)]
    assert files.rows(files.read(tmp_path / "b")["e"], 3) == want


# Split and join


def neox(shards: int = 3) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    out: list[dict[str, tuple[str, tuple[int, ...]]]] = []
    for layer in range(shards):
        qkv = {QKV.format(layer, "weight"): ("BF16", (3 * H * D, H * D)), QKV.format(layer, "bias"): ("BF16", (3 * H * D,))}
        out.append({**qkv, f"gpt_neox.layers.{layer}.mlp.weight": ("BF16", (5, H * D))})
    return out


def test_split_and_join_a_sharded_checkpoint(tmp_path: Path) -> None:
    parts = files.checkpoint(tmp_path / "a", neox(), NEOX)
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "a" / "sub" / "tokens.json").write_text("{}")
    before = files.snapshot(tmp_path / "a")
    tt.convert(tmp_path / "a", tmp_path / "b", "split")
    found = files.read(tmp_path / "b")
    for layer in range(3):
        for end in ("weight", "bias"):
            rows = files.rows(parts[QKV.format(layer, end)], 3 * H * D)
            for number, name in enumerate(("query", "key", "value")):
                mine = b"".join(rows[head * 3 * D + number * D + dim] for head in range(H) for dim in range(D))
                assert found[f"gpt_neox.layers.{layer}.attention.{name}.{end}"] == mine
    assert len(found) == 3 * 7
    back = tt.convert(tmp_path / "b", tmp_path / "c", "fused:h (q|k|v) d")
    assert files.read(tmp_path / "c") == parts
    names = set(files.snapshot(tmp_path / "c"))
    assert names == set(before) and {"sub/tokens.json", "config.json"} < names and set(back.files) == names
    assert files.snapshot(tmp_path / "a") == before
    assert (tmp_path / "c" / "model.safetensors.index.json").read_bytes() != b""


def test_joined_tensors_of_different_files_go_where_q_was(tmp_path: Path) -> None:
    shapes = {part: ("F32", (n * D, IN)) for part, n in (("q", H), ("k", G), ("v", G))}
    shards = [{"m.0.self_attn.q_proj.weight": shapes["q"], "m.z": ("U8", (3,))}, {"m.0.self_attn.k_proj.weight": shapes["k"]},
              {"m.0.self_attn.v_proj.weight": shapes["v"], "m.y": ("U8", (3,))}]  # fmt: skip
    parts = files.checkpoint(tmp_path / "a", shards)
    given = {"*.q_proj.weight": "(q h d)", "*.k_proj.weight": "(k g d)", "*.v_proj.weight": "(v g d)"}
    made = tt.plan(tmp_path / "a", "fused:g (q r|k|v) d", layouts=given, h=H, g=G, d=D)
    assert [file.name for file in made.files] == ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    tt.convert(tmp_path / "a", tmp_path / "b", "fused:g (q r|k|v) d", layouts=given, h=H, g=G, d=D)
    joined = parts["m.0.self_attn.q_proj.weight"] + parts["m.0.self_attn.k_proj.weight"] + parts["m.0.self_attn.v_proj.weight"]
    found = files.read(tmp_path / "b")
    assert found["m.0.self_attn.qkv_proj.weight"] == moved(joined, "(q h|k g|v g) d", "g (q r|k|v) d", h=H, g=G, d=D)
    assert found["m.z"] == parts["m.z"] and found["m.y"] == parts["m.y"] and len(found) == 3


def test_rows_declared_zero(tmp_path: Path) -> None:
    """A BERT without a bias of k: joined, those rows are zero; split again, they are gone."""
    home = "bert.encoder.layer.0.attention.self."
    made = {f"{home}{part}.weight": ("F32", (H * D, H * D)) for part in ("query", "key", "value")}
    made |= {f"{home}{part}.bias": ("F32", (H * D,)) for part in ("query", "value")}
    config = {"model_type": "bert", "hidden_size": H * D, "num_attention_heads": H}
    parts = files.checkpoint(tmp_path / "a", [made], config)
    tt.convert(tmp_path / "a", tmp_path / "b", "fused:h (q|k|v) d")
    fused = {name.rpartition(".")[2]: data for name, data in files.read(tmp_path / "b").items()}
    zero = bytes(H * D * 4)
    apart = parts[f"{home}query.bias"] + zero + parts[f"{home}value.bias"]
    assert fused["bias"] == moved(apart, "(q|k|v) h d", "h (q|k|v) d", h=H, d=D)
    tt.convert(tmp_path / "b", tmp_path / "c", "(q|k|v) h d")
    assert {name.rpartition(".")[2]: data for name, data in files.read(tmp_path / "c").items()}["bias"] == apart
    tt.convert(tmp_path / "c", tmp_path / "d", "split")
    assert files.read(tmp_path / "d") == parts


def test_rows_declared_zero_that_are_not(tmp_path: Path) -> None:
    zeroed = bytes(3 * H * D * 4)
    files.raw(tmp_path / "n.safetensors", {"w.bias": files.entry("F32", [3 * H * D], 0, len(zeroed))}, files.noise(len(zeroed)))
    with pytest.raises(PlanError, match="declares zero are not"):
        tt.convert(tmp_path / "n.safetensors", tmp_path / "m.safetensors", "split", layouts={"w.bias": "(q|k=0|v) h d"}, h=H)
    assert not (tmp_path / "m.safetensors").exists() and not list(tmp_path.glob(".*"))


def test_one_tensor_in_two_roles(tmp_path: Path) -> None:
    parts = files.checkpoint(tmp_path / "a", [{"w.weight": ("F32", ((H + G) * D, IN))}])
    tt.convert(tmp_path / "a", tmp_path / "b", "split", layouts={"w.weight": "(q h|k=v g) d"}, h=H, g=G)
    found, cut = files.read(tmp_path / "b"), H * D * IN * 4
    assert found == {
        "q_proj.weight": parts["w.weight"][:cut],
        "k_proj.weight": parts["w.weight"][cut:],
        "v_proj.weight": parts["w.weight"][cut:],
    }


# Models


def tiny(kind: str) -> tuple[Any, torch.Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config: Any
    if kind == "gpt2":
        config = GPT2Config(n_embd=24, n_head=6, n_layer=2, vocab_size=31, n_positions=16, bos_token_id=0, eos_token_id=0)
        model: Any = GPT2LMHeadModel(config)
    else:
        config = GPTNeoXConfig(
            hidden_size=24, num_attention_heads=6, num_hidden_layers=2, intermediate_size=20, vocab_size=31, rotary_pct=0.5
        )
        model = GPTNeoXForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval(), torch.randint(0, 31, (2, 7))


def by_hand(weight: torch.Tensor, kind: str, to: str) -> torch.Tensor:
    """view and permute, written out."""
    if kind == "gpt2":
        table = weight.view(*weight.shape[:-1], 3, 6, 4)
        return {"h (q|k|v) d": table.transpose(-3, -2), "h d (q|k|v)": table.movedim(-3, -1)}[to].reshape(weight.shape)
    table = weight.view(6, 3, 4, *weight.shape[1:])
    return {"(q|k|v) h d": table.transpose(0, 1), "h d (q|k|v)": table.transpose(1, 2)}[to].reshape(weight.shape)


@pytest.mark.parametrize(
    "kind, home, others", [("gpt2", "(q|k|v) h d", ["h (q|k|v) d", "h d (q|k|v)"]), ("neox", "h (q|k|v) d", ["(q|k|v) h d", "h d (q|k|v)"])]
)
def test_models_of_transformers(tmp_path: Path, kind: str, home: str, others: list[str]) -> None:
    model, tokens = tiny(kind)
    model.save_pretrained(tmp_path / "a", max_shard_size="8KB")
    kept = files.read(tmp_path / "a")
    with torch.no_grad():
        expected = model(tokens).logits
    for number, to in enumerate([*others, "split"]):
        there, back = tmp_path / f"there{number}", tmp_path / f"back{number}"
        tt.convert(tmp_path / "a", there, to)
        if to != "split":
            loaded = {name: tensor for file in there.glob("*.safetensors") for name, tensor in load_file(file).items()}
            for name, tensor in model.state_dict().items():
                if "c_attn" in name or "query_key_value" in name:
                    assert torch.equal(loaded[name], by_hand(tensor, kind, to))
            with torch.no_grad():
                assert not torch.equal(type(model).from_pretrained(there)(tokens).logits, expected), "the layout matters"
        tt.convert(there, back, f"fused:{home}")
        assert files.read(back) == kept
        with torch.no_grad():
            assert torch.equal(type(model).from_pretrained(back)(tokens).logits, expected)


def test_separate_projections_of_a_family(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=20, vocab_size=31
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "a")
    tt.convert(tmp_path / "a", tmp_path / "b", "fused:g (q r|k|v) d")
    one, two = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    home = "model.layers.1.self_attn."
    q, k, v = (one[f"{home}{part}_proj.weight"] for part in "qkv")
    assert torch.equal(
        two[f"{home}qkv_proj.weight"], torch.cat([q.view(2, 3, 4, 24), k.view(2, 1, 4, 24), v.view(2, 1, 4, 24)], 1).reshape(40, 24)
    )
    tt.convert(tmp_path / "b", tmp_path / "c", "split")
    assert files.read(tmp_path / "c") == files.read(tmp_path / "a")


# The mover, whatever the nests


@st.composite
def permutations(draw: st.DrawFn) -> tuple[int, list[Nest], list[Nest]]:
    """A random permutation of blocks of bytes as nests of one or two sources: (bytes of the output, nests of source 0, of source 1)."""
    outer, blocks, width = draw(st.integers(1, 5)), draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 3, 8, 40, 500]))
    order = draw(st.permutations(range(blocks)))
    cut = draw(st.integers(0, blocks))
    row = blocks * width
    both: tuple[list[Nest], list[Nest]] = ([], [])
    for to, of in enumerate(order):
        side, at, whole = (0, of, cut) if of < cut else (1, of - cut, blocks - cut)
        both[side].append(Nest(to * width, at * width, width, ((outer, row, whole * width),) if outer > 1 else ()))
    return outer * row, *both


@settings(max_examples=60)
@given(
    permutations(), st.sampled_from([16, 64, 4096]), st.sampled_from([0, 64, 10**9]), st.sampled_from([2, 5, 1000]), st.sampled_from([0, 9])
)
def test_any_nests_at_any_buffer_size(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[int, list[Nest], list[Nest]], window: int, short: int, most: int, beyond: int
) -> None:
    size, *nests = case
    folder = tmp_path_factory.mktemp("mover")
    sources = [files.noise(sum(n.size for n in side) + 5 + beyond, seed) for seed, side in enumerate(nests)]
    expected = bytearray(size)
    for source, side in zip(sources, nests, strict=True):
        for n in side:
            for i in range(n.dims[0][0] if n.dims else 1):
                to, of = (n.out + i * n.dims[0][1], n.into + i * n.dims[0][2]) if n.dims else (n.out, n.into)
                expected[to : to + n.width] = source[5 + of : 5 + of + n.width]
    feeds = []
    for number, (source, side) in enumerate(zip(sources, nests, strict=True)):
        (folder / str(number)).write_bytes(source)
        feeds.append(Feed(str(number), str(number), 5, len(source) - 5, tuple(side)))
    feeds = [feed for feed in feeds if feed.nests]
    with pytest.MonkeyPatch.context() as patch, (folder / "out").open("w+b") as out:
        for name, value in (("WINDOW", window), ("SHORT", short), ("MAX_RUNS", most), ("MAX_VECTORS", most)):
            patch.setattr(mover, name, value)
        mover.windows.cache_clear()
        mover.tiling.cache_clear()
        fds = [os.open(folder / feed.file, os.O_RDONLY) for feed in feeds]
        written: list[int] = []
        Mover().move(Step("x", "U8", (size,), 0, size, tuple(feeds)), fds, out.fileno(), 3, written.append)
        for fd in fds:
            os.close(fd)
        assert (folder / "out").read_bytes() == bytes(3) + bytes(expected) and sum(written) == size
    mover.windows.cache_clear()
    mover.tiling.cache_clear()


def test_short_reads_and_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = files.checkpoint(tmp_path / "a", neox(1), NEOX)
    readv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: readv(fd, [views[0][: random.Random(at).randint(1, 7)]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:11], at))
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d")
    monkeypatch.undo()
    name = QKV.format(0, "weight")
    assert files.read(tmp_path / "b")[name] == moved(parts[name], "h (q|k|v) d", "(q|k|v) h d", h=H, d=D)


# Errors, kills, and running again


CALLS = ["pwrite", "fsync", "posix_fallocate", "preadv", "rename", "open", "mkdir", "ftruncate", "unlink"]


@pytest.mark.parametrize("source", ["a", "a/model-00002-of-00002.safetensors"], ids=["folder", "file"])
@pytest.mark.parametrize("call", CALLS)
def test_an_error_at_any_call_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, source: str) -> None:
    """The n-th call of each kind fails, for every n until the conversion comes through."""
    files.checkpoint(tmp_path / "a", neox(2), NEOX)
    out = tmp_path / ("b" if source == "a" else "b.safetensors")
    made = tt.plan(tmp_path / source, "split", out, layouts={} if source == "a" else {"*query_key_value*": "h (q|k|v) d"}, h=H)
    before, real, failed = files.snapshot(tmp_path), getattr(os, call), 0
    for n in itertools.count(1):
        calls = 0

        def fails(*args: Any, n: int = n, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                raise OSError(28, "No space left on device")
            return real(*args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            try:
                run.run(made, workers=1)
            except tt.TriptychError as error:
                failed += 1
                assert isinstance(error, (FormatError, OutputError, PlanError)) and calls >= n
                assert files.snapshot(tmp_path) == before and not out.exists(), (call, n)
                continue
        break
    assert out.exists() and (calls < n or call == "mkdir"), "a folder that is there need not be made"
    assert failed or (source != "a" and call in ("mkdir", "ftruncate", "unlink")), "a file alone needs no folder and no marker"


def test_an_empty_folder_stays_when_it_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.checkpoint(tmp_path / "a", neox(), NEOX)
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError):
        tt.convert(tmp_path / "a", tmp_path / "b", "split")
    assert list((tmp_path / "b").iterdir()) == []


KILLED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may have been told to ignore it
import os, sys, time
import triptych as tt
calls, after = 0, int(sys.argv[3])
def tick(size):
    global calls
    calls += 1
    if calls == after:
        os.kill(os.getpid(), int(sys.argv[4]))
        time.sleep(0.5)
tt.convert(sys.argv[1], sys.argv[2], "(q|k|v) h d", progress=tick, workers=1)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_is_run_again(tmp_path: Path, how: signal.Signals) -> None:
    files.checkpoint(tmp_path / "a", neox(4), NEOX)
    before = files.snapshot(tmp_path / "a")
    tt.convert(tmp_path / "a", tmp_path / "whole", "(q|k|v) h d")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a"), str(tmp_path / "b"), "5", str(int(how))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    left = files.snapshot(tmp_path / "b")
    assert ".triptych-unfinished.json" in left and "model-00001-of-00004.safetensors" in left and "model.safetensors.index.json" not in left
    assert any(name.endswith(".triptych-part") for name in left) == (how == signal.SIGKILL)
    again = tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d")
    assert "model-00001-of-00004.safetensors" in again.kept
    assert files.snapshot(tmp_path / "b") == files.snapshot(tmp_path / "whole")
    assert files.snapshot(tmp_path / "a") == before


def unfinished(folder: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(folder / "a"), str(folder / "b"), "3", str(int(signal.SIGKILL))]
    subprocess.run(command, capture_output=True)


def test_an_unfinished_run_of_something_else_is_refused(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", neox(), NEOX)
    unfinished(tmp_path)
    left = files.snapshot(tmp_path / "b")
    with pytest.raises(PlanError, match="another conversion is unfinished here"):
        tt.convert(tmp_path / "a", tmp_path / "b", "h d (q|k|v)")
    with pytest.raises(FormatError, match="the input is an unfinished conversion"):
        tt.inspect(tmp_path / "b")
    os.utime(tmp_path / "a" / "model-00001-of-00003.safetensors", ns=(1, 1))
    with pytest.raises(PlanError, match="the input has changed"):
        tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d")
    assert files.snapshot(tmp_path / "b") == left


def test_two_runs_into_one_place_exclude_each_other(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", neox(), NEOX)
    made, single = tt.plan(tmp_path / "a", "split", tmp_path / "b"), tmp_path / "a" / "model-00001-of-00003.safetensors"
    alone = tt.plan(single, "split", tmp_path / "c.safetensors", layouts={"*query_key_value*": "h (q|k|v) d"}, h=H)
    for plan in (made, alone):
        refused = []

        def second(size: int, plan: Any = plan, refused: list[str] = refused) -> None:
            with pytest.raises(PlanError, match="another run is writing"):
                run.run(plan)
            refused.append("yes")

        run.run(plan, progress=second)
        assert refused
    assert len(files.read(tmp_path / "b")) == 21 and len(files.read(tmp_path / "c.safetensors")) == 7


def test_a_source_that_changes_under_the_run(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", neox(), NEOX)

    def touch(size: int) -> None:
        os.utime(tmp_path / "a" / "model-00002-of-00003.safetensors", ns=(1, 1))

    with pytest.raises(FormatError, match="was changed while"):
        tt.convert(tmp_path / "a", tmp_path / "b", "split", progress=touch)
    assert not (tmp_path / "b").exists()


def test_the_same_input_gives_the_same_bytes_anywhere(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", neox(), NEOX)
    files.checkpoint(tmp_path / "elsewhere" / "a2", neox(), NEOX)
    tt.convert(tmp_path / "a", tmp_path / "b", "split", workers=1)
    tt.convert(tmp_path / "elsewhere" / "a2", tmp_path / "b2", "split", workers=3)
    assert files.snapshot(tmp_path / "b") == files.snapshot(tmp_path / "b2")


def test_an_output_that_appears_after_the_plan_is_left_alone(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", [{"x.query_key_value.weight": ("F32", (18, 5))}])
    given = {"*": "h (q|k|v) d @ 0"}
    made = tt.plan(tmp_path / "a" / "model.safetensors", "(q|k|v) h d", tmp_path / "b.safetensors", layouts=given, h=2)
    (tmp_path / "b.safetensors").write_bytes(b"another's")
    with pytest.raises(PlanError, match="the output exists"):
        run.run(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.safetensors"]
    assert (tmp_path / "b.safetensors").read_bytes() == b"another's"


def test_links_are_read_through_and_never_written_through(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "blobs", neox(), NEOX)
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "a" / path.name).symlink_to(f"../blobs/{path.name}")
    before = files.snapshot(tmp_path / "blobs")
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d")
    assert files.snapshot(tmp_path / "blobs") == before
    assert not any(path.is_symlink() for path in (tmp_path / "b").iterdir())


def test_systems_that_cannot_preallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.checkpoint(tmp_path / "a", neox(1), NEOX)
    tt.convert(tmp_path / "a", tmp_path / "b", "split")

    def refuses(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuses)
    tt.convert(tmp_path / "a", tmp_path / "c", "split")
    monkeypatch.delattr(os, "posix_fallocate")
    tt.convert(tmp_path / "a", tmp_path / "d", "split")
    assert files.snapshot(tmp_path / "b") == files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "d")


def test_what_is_written_is_hastened_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each large tensor once it is whole, in portions, before the file is synced; a system that cannot writes the same."""
    files.checkpoint(tmp_path / "a", neox(1), NEOX)
    monkeypatch.setattr(run, "WINDOW", 1000)
    monkeypatch.setattr(mover, "PORTION", 300)
    made = tt.plan(tmp_path / "a", "split", tmp_path / "b")
    fsync, real = os.fsync, os.posix_fadvise
    events: list[tuple[str, range | None]] = []

    def told(fd: int, at: int, size: int, advice: int) -> None:
        assert 0 < size <= 300 and advice == os.POSIX_FADV_DONTNEED
        events.append((str(Path(f"/proc/self/fd/{fd}").readlink()), range(at, at + size)))
        real(fd, at, size, advice)

    def synced(fd: int) -> None:
        events.append((str(Path(f"/proc/self/fd/{fd}").readlink()), None))
        fsync(fd)

    monkeypatch.setattr(os, "posix_fadvise", told)
    monkeypatch.setattr(os, "fsync", synced)
    run.run(made, workers=1)
    (file,) = made.files
    large = [step for step in file.steps if step.size >= 1000]
    base = len(made.headers[file.name])
    part = str(tmp_path / "b" / f".{file.name}.triptych-part")
    mine = [what for name, what in events if name == part]
    assert mine.pop() is None, "the sync comes last"
    assert [byte for what in mine for byte in what or ()] == [base + step.start + i for step in large for i in range(step.size)]
    assert 0 < len(large) < len(file.steps)

    def refuses(*args: Any) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuses)
    tt.convert(tmp_path / "a", tmp_path / "c", "split")
    monkeypatch.delattr(os, "posix_fadvise")
    tt.convert(tmp_path / "a", tmp_path / "d", "split")
    assert files.snapshot(tmp_path / "b") == files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "d")


def test_umask_and_modes(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", neox(1), NEOX)
    (tmp_path / "a" / "run.sh").write_text("x")
    (tmp_path / "a" / "run.sh").chmod(0o755)
    old = os.umask(0o027)
    try:
        tt.convert(tmp_path / "a", tmp_path / "b", "split")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "b").iterdir()}
    assert modes["model.safetensors"] == 0o640 and modes["run.sh"] == 0o750


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """200 MB of rows of one run each, converted in a process that may use 100 MB."""
    heads, dim, columns = 64, 16, 16384
    made = {f"l.{i}.query_key_value.weight": ("BF16", (3 * heads * dim, columns)) for i in range(2)}
    header, at = {}, 0
    for name, (dtype, shape) in made.items():
        header[name] = files.entry(dtype, list(shape), at, at := at + shape[0] * shape[1] * 2)
    path = files.raw(tmp_path / "a.safetensors", header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + at)
    code = f"""
import triptych as tt
tt.convert({str(path)!r}, {str(tmp_path / "b.safetensors")!r}, "h d (q|k|v)", layouts={{"*": "(q|k|v) h d"}}, h={heads})
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""
    peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(peak) < 80_000 and (tmp_path / "b.safetensors").stat().st_size > at


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", neox(), NEOX)
    seen: list[int] = []
    done = tt.convert(tmp_path / "a", tmp_path / "b", "h d (q|k|v)", progress=seen.append)
    headers = sum(map(len, done.plan.headers.values()))
    assert sum(seen) == done.size - headers - len(done.plan.index[1] if done.plan.index else b"")
    with pytest.raises(PlanError, match="at least one worker"):
        tt.convert(tmp_path / "a", tmp_path / "c", "split", workers=0)


def test_save_file_reads_back_what_we_wrote(tmp_path: Path) -> None:
    """Another program that keeps the metadata keeps the stamp; one that drops it falls back to the record."""
    files.checkpoint(tmp_path / "a", neox(1), NEOX)
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d")
    loaded = load_file(tmp_path / "b" / "model.safetensors")
    save_file(loaded, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    assert {str(packed.layout) for packed in tt.inspect(tmp_path / "b").projections} == {"h (q|k|v) d"}
    with pytest.raises(tt.MismatchError, match="part k"):
        tt.verify(tmp_path / "a", tmp_path / "b")
