"""The cache by itself, against a plain list of tokens; and in the place of transformers' own."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import triptych as tt
from triptych.live.kv_cache import KVCache


def tokens(batch: int, count: int, seed: int, heads: int = 3, dims: tuple[int, int] = (4, 5), dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, count, dim, generator=generator).to(dtype) for dim in dims)


@settings(max_examples=150)
@given(st.data())
def test_the_cache_is_a_list_of_tokens(data: st.DataObject) -> None:
    batch, window = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([None, 1, 2, 4]))
    spare = data.draw(st.integers(0, 3))
    cache = KVCache(data.draw(st.integers(1, 8)), window=window, spare=spare)
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    for seed in range(data.draw(st.integers(1, 9))):
        kind = data.draw(st.sampled_from(["append", "append", "rollback", "reorder", "save"])) if seed else "append"
        if kind == "append":
            count = data.draw(st.integers(1, 4))
            new = data.draw(st.one_of(st.none(), st.lists(st.integers(0, count), min_size=len(rows), max_size=len(rows))))
            first = max(0, min(map(len, rows)) - window + 1) if window else 0
            k, v = tokens(len(rows), count, seed)
            keys, values = cache.update(k, v, new=new)
            for row, each in enumerate(rows):
                each += list(torch.cat([k, v], -1)[row].unbind(1))[: count if new is None else new[row]]
                held = torch.cat([keys, values], -1)[row, :, : len(each) - first]
                assert torch.equal(held, torch.stack(each[first:], 1) if each[first:] else held[:, :0])
        elif kind == "rollback":
            counts = [min(data.draw(st.integers(0, spare if window else 5)), len(row)) for row in rows]
            cache.rollback(counts)
            for row, count in zip(rows, counts, strict=True):
                del row[len(row) - count :]
        elif kind == "reorder":
            order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
            cache.reorder(torch.tensor(order))
            rows = [[*rows[i]] for i in order]
        else:
            cache = copy.deepcopy(cache)
        assert cache.lengths == tuple(map(len, rows))


def test_updates_are_in_place_and_results_are_views() -> None:
    cache = KVCache(capacity=8)
    first, _ = cache.update(*tokens(2, 3, 0))
    second, values = cache.update(*tokens(2, 1, 1))
    assert first.data_ptr() == second.data_ptr() == cache[0].keys.data_ptr()
    assert torch.equal(second[:, :, :3], first) and values.shape == (2, 3, 4, 5)
    grown, _ = cache.update(*tokens(2, 5, 2))
    assert grown.data_ptr() != first.data_ptr() and cache[0].buffers["k"].shape[2] == 16
    assert torch.equal(grown[:, :, :4], second)


def test_fixed_length_allocates_once_and_says_when_it_is_full() -> None:
    cache = KVCache(max_length=6)
    keys, _ = cache.update(*tokens(1, 4, 0))
    assert cache.nbytes == 3 * 6 * (4 + 5) * 4
    assert cache.update(*tokens(1, 2, 1))[0].data_ptr() == keys.data_ptr()
    with pytest.raises(tt.SizeError, match="the cache is full\n  expected max_length=6\n  found    7 tokens"):
        cache.update(*tokens(1, 1, 2))
    cache.rollback(1)
    cache.update(*tokens(1, 1, 2))


def test_a_window_bounds_the_memory() -> None:
    cache = KVCache(window=8, spare=2)
    cache.update(*tokens(1, 500, 0))
    cache.update(*tokens(1, 1, 1))
    small = cache.nbytes
    for seed in range(100):
        keys, _ = cache.update(*tokens(1, 1, seed))
        assert keys.shape[2] == 8
    assert cache.nbytes == small == 3 * 19 * (4 + 5) * 4
    assert cache.length == 601
    cache.rollback(2)
    with pytest.raises(tt.SizeError, match="the window has moved on"):
        cache.truncate(300)


def test_a_rollback_that_one_layer_refuses_changes_none() -> None:
    cache = KVCache()
    past = cache.for_transformers(
        transformers.Gemma3TextConfig(num_hidden_layers=2, sliding_window=3, layer_types=["full_attention", "sliding_attention"])
    )
    for layer in (0, 1):
        for _ in range(60):
            past.update(*tokens(1, 1, 0), layer)
    with pytest.raises(tt.SizeError, match="the window has moved on"):
        cache.rollback(55)
    assert cache.lengths == cache[1].lengths == (60,)
    cache.rollback(16)
    assert cache.lengths == cache[1].lengths == (44,)


def test_truncate_row_by_row() -> None:
    cache = KVCache()
    for layer in (0, 1):
        cache.update(*tokens(3, 5, 0), layer)
    cache.truncate([2, 9, 0])
    assert cache.lengths == cache[1].lengths == (2, 5, 0)
    cache.truncate(1)
    assert cache.lengths == (1, 1, 0)
    cache.reset()
    assert cache.lengths == () and cache.nbytes == 0


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"store": torch.int8}, {"max_length": 9}])
def test_saved_and_loaded_it_goes_on_as_before(tmp_path: Path, options: dict[str, object]) -> None:
    cache = KVCache(5, **options)
    for layer in (0, 1):
        cache.update(*tokens(2, 7, layer, dtype=torch.bfloat16), layer, new=[7, 4])
    cache.save(tmp_path / "cache")
    again = KVCache.load(tmp_path / "cache")
    assert again.lengths == (7, 4) and again.options == cache.options
    for layer in (1, 0):
        for ours, theirs in zip(
            again.update(*tokens(2, 2, 9, dtype=torch.bfloat16), layer),
            cache.update(*tokens(2, 2, 9, dtype=torch.bfloat16), layer),
            strict=True,
        ):
            assert torch.equal(ours, theirs) and ours.dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no cache")
    torch.save({"kind": "else"}, tmp_path / "else")
    torch.save({"kind": "triptych kv cache 1", "options": {"capacity": 0}, "layers": []}, tmp_path / "sizes")
    good = KVCache()
    good.update(*tokens(1, 3, 0))
    good.save(tmp_path / "good")
    content = torch.load(tmp_path / "good", weights_only=True)
    content["layers"][0]["lengths"] = (9,)
    torch.save(content, tmp_path / "lengths")
    for name in ("text", "else", "sizes", "lengths"):
        with pytest.raises(tt.FormatError, match="not a saved KVCache"):
            KVCache.load(tmp_path / name)


@pytest.mark.parametrize(("store", "bound"), [(torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_small_within_the_bound(store: torch.dtype, bound: float, dtype: torch.dtype) -> None:
    cache = KVCache(8, store=store)
    k, v = tokens(2, 6, 0, dims=(64, 64), dtype=dtype)
    k[0, 0, 0] = 0
    cache.update(k[:, :, :5], v[:, :, :5], new=[5, 3])
    keys, values = cache.update(k[:, :, 5:], v[:, :, 5:])
    rounding = 0 if dtype == torch.float32 else 2**-8
    for row, length in ((0, 6), (1, 4)):
        order = [*range(length - 1), 5]
        for ours, theirs in ((keys, k), (values, v)):
            exact = theirs[row, :, order].double()
            assert ours.dtype == dtype
            assert ((ours[row, :, :length].double() - exact).abs() <= (bound + rounding + 1e-6) * exact.abs().amax(-1, keepdim=True)).all()
    plain = KVCache(8)
    plain.update(k, v)
    assert cache.nbytes < plain.nbytes * (0.6 if dtype == torch.bfloat16 else 0.3)


def test_inference_mode_and_gradients_do_not_reach_the_cache() -> None:
    cache = KVCache(2)
    with torch.inference_mode():
        cache.update(*tokens(1, 3, 0))
    k, v = tokens(1, 2, 1)
    keys, _ = cache.update(k.requires_grad_(), v)
    assert not keys.requires_grad and cache.lengths == (5,)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda c: c.update(*tokens(2, 1, 0)),
            "do not fit the cache\n  tensor   k\n  expected .3, 3, 1, 4. torch.float32 cpu\n  found    .2",
        ),
        (lambda c: c.update(*tokens(3, 1, 0, heads=2)), "do not fit the cache"),
        (lambda c: c.update(*tokens(3, 1, 0, dims=(4, 6))), "tensor   v"),
        (lambda c: c.update(*tokens(3, 1, 0, dtype=torch.float64)), "found    .* torch.float64"),
        (lambda c: c.update(*tokens(3, 2, 0), new=[1, 3, 0]), "each 0 to 2"),
        (lambda c: c.update(*tokens(3, 2, 0), new=[1]), "3 numbers"),
        (lambda c: c.update(torch.zeros(3, 4), torch.zeros(3, 4), layer=1), "do not belong together"),
        (lambda c: c.update(tokens(3, 4, 0)[0], tokens(3, 4, 0, heads=2)[1], layer=1), "do not belong together"),
        (lambda c: c.rollback(5), "cannot roll back so many tokens\n  expected 0 to 4"),
        (lambda c: c.rollback(-1), "cannot roll back"),
        (lambda c: c.truncate(-1), "shorter than empty"),
        (lambda c: c.reorder([0, 3]), "no such row of the batch\n  expected 0 to 2"),
        (lambda c: c[-1], "layers count from 0"),
        (lambda c: KVCache(0), "capacity must be a whole number"),
        (lambda c: KVCache(window=0), "window must be"),
        (lambda c: KVCache(store=torch.float16), "cannot store in this dtype"),
    ],
)
def test_errors(act: object, words: str) -> None:
    cache = KVCache()
    cache.update(*tokens(3, 4, 0))
    with pytest.raises(tt.LayoutError, match=words):
        act(cache)
    assert cache.lengths == (4, 4, 4)


def test_an_update_does_not_depend_on_the_length() -> None:
    def seconds(length: int) -> float:
        cache = KVCache(max_length=length + 64)
        cache.update(torch.zeros(1, 8, length, 64), torch.zeros(1, 8, length, 64))
        k = torch.zeros(1, 8, 1, 64)
        best = float("inf")
        for _ in range(60):
            start = time.perf_counter()
            cache.update(k, k)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(16384) < 5 * seconds(64), "a copy of 16384 tokens is hundreds of times one of 64"


def llama(**more: object) -> transformers.PreTrainedModel:
    base = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 6}
    said = {**base, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "head_dim": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**said, **more}))


def sliding(kind: str) -> transformers.PreTrainedModel:
    said = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    if kind == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**said))
    layers = ["sliding_attention", "full_attention"]
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**said, layer_types=layers))


def neox() -> transformers.PreTrainedModel:
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=61, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=3, eos_token_id=None
        )
    )


def gpt2() -> transformers.PreTrainedModel:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=3, n_positions=64, bos_token_id=1, eos_token_id=None)
    )


MODELS = {"llama": llama, "mistral": lambda: sliding("mistral"), "gemma3": lambda: sliding("gemma3"), "neox": neox, "gpt2": gpt2}


def built(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(8)
    model = MODELS[name]().double().eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}], ids=["greedy", "beams", "lookup", "sampled"]
)
@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_tokens_and_logits_of_dynamic_cache(name: str, how: dict[str, object]) -> None:
    model = built(name)
    rows = 1 if "prompt_lookup_num_tokens" in how else 3
    ids = torch.randint(2, 61, (rows, 7), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :4] = 0  # padded at the front, as transformers does
    told = {"attention_mask": mask, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True, **how}
    results = []
    for past in (DynamicCache(config=model.config), KVCache(4).for_transformers(model.config)):
        torch.manual_seed(9)
        results.append(model.generate(ids, past_key_values=past, **told))
    theirs, ours = results
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()


@pytest.mark.parametrize("name", MODELS)
def test_forward_in_chunks_and_cropping(name: str) -> None:
    model = built(name)
    ids = torch.randint(2, 61, (2, 15), generator=torch.Generator().manual_seed(2))
    outs = []
    for past in (DynamicCache(config=model.config), KVCache(4).for_transformers(model.config)):
        past.activate_past_recording()
        with torch.no_grad():
            steps = [model(ids[:, :9], past_key_values=past).logits, model(ids[:, 9:12], past_key_values=past).logits]
            past.crop(-2)
            steps += [model(ids[:, 10 + i : 11 + i], past_key_values=past).logits for i in range(5)]
            past.batch_select_indices(torch.tensor([1]))
            past.batch_repeat_interleave(2)
            steps += [model(ids[:, :1], past_key_values=past).logits]
        outs.append(torch.cat(steps, 1))
    assert torch.allclose(*outs, rtol=0, atol=1e-12)


def test_without_a_config_and_shared_with_the_cache() -> None:
    model = built("llama")
    cache = KVCache()
    past = cache.for_transformers()
    with torch.no_grad():
        model(torch.arange(2, 8)[None], past_key_values=past)
    assert len(cache) == 2 and cache.lengths == (6,) and past.get_seq_length() == 6
    assert past.layers[1].keys.data_ptr() == cache[1].buffers["k"].data_ptr()
    again = cache.for_transformers(model.config)
    assert again.get_seq_length() == 6 and again.get_max_length() == -1
    with pytest.raises(tt.SizeError, match="crop takes tokens to remove"):
        past.crop(3)
    past.reset()
    assert cache.lengths == ()


def test_small_storage_runs_in_transformers() -> None:
    model = built("llama")
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        plain = model(ids).logits
        for store, bound in ((torch.int8, 0.02), (torch.float8_e4m3fn, 0.1)):
            small = model(ids, past_key_values=KVCache(store=store).for_transformers(model.config)).logits
            assert 0 < (small - plain).abs().max() <= bound * plain.abs().max()
