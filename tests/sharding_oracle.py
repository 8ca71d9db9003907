"""How others divide weights among tensor-parallel ranks, restated slowly on index matrices: the oracle of sharding.

Each function says where the rule was read: the release vllm==0.33.0 (lines are those of vllm/model_executor/layers/linear.py unless another
file is named), Megatron-LM at d98e8a6 and flash-attention at 0251105. A refusal is an AssertionError, as there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.int64]


def divide(number: int, by: int) -> int:
    """Megatron-LM megatron/core/utils.py:595, vLLM vllm/distributed/utils.py:130-134: exact or not at all."""
    assert number % by == 0, f"{number} is not divisible by {by}"
    return number // by


def narrow(x: Matrix, axis: int, start: int, length: int) -> Matrix:
    assert start >= 0 and start + length <= x.shape[axis]
    return np.take(x, range(start, start + length), axis)


# vLLM


def vllm_column(x: Matrix, tp: int, rank: int, axis: int = 0) -> Matrix:
    """ColumnParallelLinear.weight_loader, 595-598: shard_size = rows of the parameter, start_idx = tp_rank * shard_size. Bias alike."""
    size = divide(x.shape[axis], tp)
    return narrow(x, axis, rank * size, size)


def vllm_row(x: Matrix, tp: int, rank: int, axis: int = 1) -> Matrix:
    """RowParallelLinear.weight_loader, 1777-1780: the same along the input; its bias has no input dim, so every rank loads all of it
    (and rank 0 alone adds it, 1814)."""
    size = divide(x.shape[axis], tp)
    return narrow(x, axis, rank * size, size)


def vllm_merged(x: Matrix, parts: int, tp: int, rank: int) -> Matrix:
    """MergedColumnParallelLinear.weight_loader with loaded_shard_id None (fused on disk): cut at sum(output_sizes[:i]), 803-807 and
    828-831, each part as a column-parallel weight, stored at sum(output_sizes[:i]) // tp, 836-839 and 860-863."""
    whole = divide(x.shape[0], parts)
    return np.concatenate([vllm_column(narrow(x, 0, i * whole, whole), tp, rank) for i in range(parts)])


def vllm_kv(heads: int, tp: int) -> tuple[int, int]:
    """QKVParallelLinear.__init__, 1065-1071: (num_kv_heads, num_kv_head_replicas) of a rank."""
    if tp >= heads:
        return 1, divide(tp, heads)
    return divide(heads, tp), 1


def vllm_qkv(q: Matrix, k: Matrix, v: Matrix, heads: int, kv_heads: int, tp: int, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """QKVParallelLinear.weight_loader, 1313-1320: shard_rank is tp_rank for q and tp_rank // num_kv_head_replicas for k and v;
    start_idx = shard_rank * shard_size. The parameter is q, k, v one after the other, 1282-1290."""
    own = divide(heads, tp)
    kv_own, replicas = vllm_kv(kv_heads, tp)
    out = []
    for x, count, shard_rank in ((q, own, rank), (k, kv_own, rank // replicas), (v, kv_own, rank // replicas)):
        size = count * divide(x.shape[0], heads if x is q else kv_heads)
        out.append(narrow(x, 0, shard_rank * size, size))
    return out[0], out[1], out[2]


def vllm_vocab(x: Matrix, pad_to: int, tp: int, rank: int, nothing: int) -> Matrix:
    """VocabParallelEmbedding, vocab_parallel_embedding.py:95-97 (pad_vocab_size), 392-402 (equal runs of the padded vocabulary, without its
    padding), 518-520 (the rows behind are filled with 0)."""
    padded = ((x.shape[0] + pad_to - 1) // pad_to) * pad_to
    size = divide(padded, tp)
    start, stop = min(rank * size, x.shape[0]), min((rank + 1) * size, x.shape[0])
    out = np.full((size, *x.shape[1:]), nothing, x.dtype)
    out[: stop - start] = x[start:stop]
    return out


def vllm_block_scale_rows(rows: int, block: int) -> int:
    """adjust_block_scale_shard, 91-93: ceil(rows / block_n)."""
    return (rows + block - 1) // block


# Megatron-LM


def megatron_column(master: Matrix, tp: int, rank: int, axis: int = 0) -> Matrix:
    """_initialize_affine_weight_cpu, megatron/core/tensor_parallel/layers.py:214-226: torch.split of the master weight by the size of a
    partition, of which rank r takes [r::world_size] (stride 1). Rows for ColumnParallelLinear (:1038, :1081), columns for
    RowParallelLinear (:1408, :1451). The bias is split by :1123, or, row-parallel, whole on every rank (:1484)."""
    size = divide(master.shape[axis], tp)
    pieces = [narrow(master, axis, at, size) for at in range(0, master.shape[axis], size)]
    return np.concatenate(pieces[rank::tp], axis)


def megatron_qkv(fused: Matrix, heads: int, groups: int, tp: int, rank: int) -> Matrix:
    """linear_qkv, rows `g (q r|k|v) d`: raw rows of the master. transformer_config.py:1461-1468 refuses groups that neither divide the
    ranks nor are divided by them; attention.py:353-366 needs whole query heads on every rank."""
    if groups % tp != 0 and tp % groups != 0:
        raise AssertionError("num_query_groups must be a multiple or divisor of tensor_model_parallel_size")
    divide(heads, tp)
    return megatron_column(fused, tp, rank)


def megatron_gathered(shards: list[Matrix], heads: int, groups: int, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """What a rank computes with when groups < ranks, attention.py:1851-1872 and 1920-1930: all shards gathered, the slice of its group
    taken, q, k, v split, and of q the heads of this rank."""
    tp = len(shards)
    whole = np.concatenate(shards)
    size = divide(whole.shape[0], groups)
    index = rank // divide(tp, groups)
    group = whole[index * size : (index + 1) * size]
    per = divide(heads, groups)
    d = divide(size, per + 2)
    q, k, v = group[: per * d], group[per * d : (per + 1) * d], group[(per + 1) * d :]
    own = divide(per, divide(tp, groups)) * d
    at = rank % divide(tp, groups) * own
    return q[at : at + own], k, v


# flash-attention


def flash_local(dim: int, tp: int, rank: int, multiple_of: int = 1) -> int:
    """get_dim_for_local_rank, flash_attn/utils/distributed.py:137-146: uneven where it must be."""
    multiple = dim // multiple_of
    return (multiple // tp + int(rank < multiple % tp)) * multiple_of


def flash_qkv(fused: Matrix, heads: int, kv_heads: int, tp: int, rank: int) -> Matrix:
    """shard_qkv_headdim, flash_attn/models/gpt.py:742-787: the heads of q, k and v that lie before and in this rank, rows q|k|v."""
    d = divide(fused.shape[0], heads + 2 * kv_heads)
    x = fused.reshape(heads + 2 * kv_heads, d, *fused.shape[1:])
    begin, kv_begin = (sum(flash_local(n, tp, r) for r in range(rank)) for n in (heads, kv_heads))
    own, kv_own = flash_local(heads, tp, rank), flash_local(kv_heads, tp, rank)
    k, v = heads + kv_begin, heads + kv_heads + kv_begin
    return np.concatenate([x[begin : begin + own], x[k : k + kv_own], x[v : v + kv_own]]).reshape(-1, *fused.shape[1:])


def flash_gated(x: Matrix, tp: int, rank: int) -> Matrix:
    """shard_gatedmlp_fc1_dim, gpt.py:733-740: a run of each half."""
    size = x.shape[0] // tp // 2
    halves = x.reshape(2, x.shape[0] // 2, *x.shape[1:])
    return halves[:, rank * size : (rank + 1) * size].reshape(-1, *x.shape[1:])


def flash_last(x: Matrix, tp: int, rank: int, multiple_of: int = 1) -> Matrix:
    """shard_last_dim, gpt.py:723-731: whole multiples of the head dim for out_proj."""
    sizes = [flash_local(x.shape[-1], tp, r, multiple_of) for r in range(tp)]
    return x[..., sum(sizes[:rank]) : sum(sizes[: rank + 1])]


def grid(*shape: int) -> Matrix:
    """Every element its own number."""
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
