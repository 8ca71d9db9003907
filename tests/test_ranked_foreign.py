"""The proof of ranks that others wrote: what vLLM and Megatron hold by their own rules, and every way in which it can be wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import triptych as tt
from tests import files, remote_servers
from tests import test_shard_megatron as megatron
from tests.remote_servers import Bucket
from tests.test_shard_foreign import VOCAB, Arrays, as_vllm, config_of, llama, rank_of, save_folders, save_vllm
from triptych.errors import MismatchError, PlanError

server, bucket = remote_servers.server, remote_servers.bucket


def change(path: Path, name: str, at: tuple[int, ...]) -> None:
    tensors = load_file(path)
    tensors[name][at] ^= 1
    save_file(tensors, path)


@pytest.mark.parametrize(("kv", "tp", "other"), [(1, 2, 3), (2, 4, 2), (3, 3, 6), (6, 2, 3)])
def test_vllm(tmp_path: Path, kv: int, tp: int, other: int) -> None:
    """Ranks and what they were merged to, both ways; the model's own files and the merged ones; ranks and ranks of ours."""
    whole, pad = llama(kv), 48 if tp % 3 == 0 else 64
    source = save_vllm(tmp_path / "a", [as_vllm(rank_of(whole, kv, tp, rank, pad)) for rank in range(tp)], config_of(kv))
    tt.merge(source, tmp_path / "m", pad_vocab_to=pad)
    proof = tt.verify(source, tmp_path / "m")
    assert (proof.projections, proof.tensors, proof.notes) == (4, 13, ()) and proof.rows == 4 * (12 + 2 * kv) * 8
    assert tt.verify(tmp_path / "m", source).projections == 4
    tt.shard(source, tmp_path / "b", other, pad_vocab_to=pad * 6)
    assert tt.verify(source, tmp_path / "b").projections == tt.verify(tmp_path / "b", source).projections == 4
    save_folders(tmp_path / "own", [whole], config_of(kv), "whole")
    assert tt.verify(tmp_path / "m", tmp_path / "own" / "whole", "split", overrides={"*.gate_up_proj.*": "split"}).projections == 6
    with pytest.raises(MismatchError, match="the ranks have other tensors than the whole"):
        tt.verify(tmp_path / "own" / "whole", source)


@pytest.mark.parametrize("rows", [False, True])
def test_folders_against_the_model_itself(tmp_path: Path, rows: bool) -> None:
    """Under the model's own names the files that the ranks were made of need no merging."""
    whole = llama(2)
    source = save_folders(tmp_path / "a", [rank_of(whole, 2, 4, rank, rows=rows) for rank in range(4)], config_of(2))
    save_folders(tmp_path / "own", [whole], config_of(2), "whole")
    for one, two in ((tmp_path / "own" / "whole", source), (source, tmp_path / "own" / "whole")):
        assert tt.verify(one, two).projections == 12
    with pytest.raises(PlanError, match="nothing says what these ranks are as a whole"):
        tt.verify(source, source)
    with pytest.raises(PlanError, match="nothing else can be asked of them"):
        tt.verify(source, tmp_path / "own" / "whole", "split")


def test_every_tensor_of_every_rank_counts(tmp_path: Path) -> None:
    whole = llama(2)
    ranks = [rank_of(whole, 2, 4, rank) for rank in range(4)]
    source = save_folders(tmp_path / "a", ranks, config_of(2))
    tt.merge(source, tmp_path / "m", pad_vocab_to=64)
    for rank, tensors in enumerate(ranks):
        path = source / f"rank{rank}" / "model.safetensors"
        kept = path.read_bytes()
        for name in [name for name in tensors if "layers.1" not in name]:
            change(path, name, tuple(size - 1 for size in tensors[name].shape))
            with pytest.raises(MismatchError):
                tt.verify(source, tmp_path / "m")
            path.write_bytes(kept)
    change(tmp_path / "m" / "model.safetensors", "lm_head.weight", (VOCAB - 1, 0))
    with pytest.raises(MismatchError, match="is not the row of the input"):
        tt.verify(source, tmp_path / "m")


def swapped(tensors: Arrays) -> Arrays:
    """The runs of two ranks of one weight in the other order."""
    name = "model.layers.1.mlp.down_proj.weight"
    half = tensors[name].shape[1] // 2
    return tensors | {name: np.ascontiguousarray(np.roll(tensors[name], half, axis=1))}


def ranked_by_groups(tensors: Arrays) -> Arrays:
    """q of the whole as if ranks held every second head."""
    name = "model.layers.0.self_attn.q_proj.weight"
    x = tensors[name].reshape(2, 6, 8, -1)
    return tensors | {name: np.ascontiguousarray(x.swapaxes(0, 1).reshape(tensors[name].shape))}


@pytest.mark.parametrize("wrong", [swapped, ranked_by_groups])
def test_a_whole_that_was_joined_wrongly(tmp_path: Path, wrong: object) -> None:
    whole = llama(2)
    source = save_folders(tmp_path / "a", [rank_of(whole, 2, 2, rank) for rank in range(2)], config_of(2))
    tt.merge(source, tmp_path / "m", pad_vocab_to=64)
    assert callable(wrong)
    save_folders(tmp_path / "own", [wrong(whole)], config_of(2), "whole")
    tt.verify(source, tmp_path / "m")
    with pytest.raises(MismatchError, match="is not the row of the input"):
        tt.verify(source, tmp_path / "own" / "whole")


def test_parts_of_vllm_lie_one_after_the_other(tmp_path: Path) -> None:
    """A whole that says otherwise of the rows of the ranks was made of a wrong belief, though its bytes agree with it."""
    whole = llama(2)
    source = save_vllm(tmp_path / "a", [as_vllm(rank_of(whole, 2, 2, rank)) for rank in range(2)], config_of(2))
    tt.merge(source, tmp_path / "m", pad_vocab_to=64, layouts={"*.qkv_proj.*": "g (q r|k|v) d"})
    with pytest.raises(MismatchError, match="vLLM holds the parts of a tensor one after the other"):
        tt.verify(source, tmp_path / "m")


def test_shapes_that_are_no_shares(tmp_path: Path) -> None:
    whole = llama(2)
    ranks = [rank_of(whole, 2, 2, rank) for rank in range(2)]
    save_folders(tmp_path / "own", [whole], config_of(2), "whole")
    name = "model.layers.0.mlp.down_proj.weight"
    odd = {"short": ranks[1][name][:, :-1], "both": ranks[1][name][:-1, :-1], "flat": ranks[1][name].reshape(-1)}
    for word, x in odd.items():
        source = save_folders(tmp_path / word, [ranks[0], ranks[1] | {name: x}], config_of(2))
        with pytest.raises(MismatchError, match="the shapes on the ranks are no shares of the whole") as error:
            tt.verify(source, tmp_path / "own" / "whole")
        assert error.value.fields["tensor"] == name
    name = "lm_head.weight"
    source = save_folders(tmp_path / "pads", [rank | {name: np.pad(rank[name], ((0, 5), (0, 0)))} for rank in ranks], config_of(2))
    with pytest.raises(MismatchError, match="padded to several lengths"):
        tt.verify(source, tmp_path / "own" / "whole")


def test_megatron(tmp_path: Path) -> None:
    whole = megatron.core()
    ranks = [megatron.tensors(megatron.rank_of(whole, 4, rank)) for rank in range(4)]
    source = megatron.save(tmp_path / "a", ranks, megatron.ARGS)
    tt.merge(source, tmp_path / "m")
    proof = tt.verify(source, tmp_path / "m")
    assert proof.projections and proof.notes == ()


def test_behind_urls(bucket: Bucket, tmp_path: Path) -> None:
    """Ranks of ours and of others, of which whatever lies behind a URL is read by range."""
    whole = llama(2)
    save_folders(tmp_path / "own", [whole], config_of(2), "whole")
    source = save_vllm(tmp_path / "a", [as_vllm(rank_of(whole, 2, 4, rank)) for rank in range(4)], config_of(2))
    tt.merge(source, tmp_path / "m", pad_vocab_to=64)
    tt.shard(tmp_path / "own" / "whole", tmp_path / "b", 2, pad_vocab_to=64)
    for name, place in (("own", tmp_path / "own" / "whole"), ("a", source), ("m", tmp_path / "m"), ("b", tmp_path / "b")):
        bucket.put(f"{name}/", files.snapshot(place))
    assert tt.verify("s3://bucket/a", tmp_path / "m") == replace(tt.verify(source, tmp_path / "m"), path="s3://bucket/a")
    assert tt.verify("s3://bucket/m", "s3://bucket/a").projections == 4
    proof = tt.verify("s3://bucket/own", "s3://bucket/b")
    assert proof == replace(tt.verify(tmp_path / "own" / "whole", tmp_path / "b"), path="s3://bucket/own", out="s3://bucket/b")
    name = "model-rank-3-part-1.safetensors"
    data = (source / name).read_bytes()
    bucket.put("a/", {name: data[:-1] + bytes([data[-1] ^ 1])})
    with pytest.raises(MismatchError):
        tt.verify("s3://bucket/a", tmp_path / "m")
