"""trace: the puzzle and its mending lines, names and lines, what is and is no conflict, and that nothing else changes."""

# ruff: noqa: F841, RUF059  (names that are bound are the subject)
from __future__ import annotations

import functools
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import FalconConfig, GPT2Config, GPT2Model, GPTNeoXConfig
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconRotaryEmbedding
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXRotaryEmbedding

from triptych.errors import TraceError
from triptych.layout import Layout
from triptych.live.names import names_read
from triptych.live.reading import role_of
from triptych.live.report import Conflict, Report, TracedTensor
from triptych.live.trace import trace
from triptych.render_code import part_line, read_lines
from triptych.rowmap import parts
from triptych.sizes import bind

NEOX, GPT2 = "h (q|k|v) d", "(q|k|v) h d"
B, S, H, D, E = 2, 3, 4, 5, 20


def whole_numbers(module: nn.Module) -> Any:
    """Small integers as parameters, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-8, 8, parameter.shape, generator=generator))
    return module.double()


def tokens(width: int = E) -> Tensor:
    return torch.randint(-8, 8, (B, S, width), generator=torch.Generator().manual_seed(2)).double()


@functools.cache
def example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "seed_puzzle.py"
    spec = importlib.util.spec_from_file_location("seed_puzzle", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line_of(code: Any, text: str) -> int:
    """The number of the one line of a function that contains `text`."""
    import inspect

    lines, start = inspect.getsourcelines(code)
    return next(start + i for i, line in enumerate(lines) if text in line)


def named(report: Report, name: str) -> TracedTensor:
    """The tensor last bound to `name`."""
    return [t for t in report.tensors if name in t.names][-1]


def sides(report: Report) -> list[tuple[str, str, str, str]]:
    return [(c.a, c.b, str(c.layout_a), str(c.layout_b)) for c in report.conflicts]


# -- the puzzle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("grad", [True, False])
def test_the_puzzle(dtype: torch.dtype, grad: bool) -> None:
    model = example().Attention(n_embd=128, n_head=4).to(dtype)
    with torch.set_grad_enabled(grad):
        report = trace(model.get_q_matrix, torch.randn(2, 5, 128, dtype=dtype))
    assert sides(report) == [("q", "manual_q", NEOX, GPT2)]
    (conflict,) = report.conflicts
    method = example().Attention.get_q_matrix
    assert conflict.line_a == line_of(method, "q, k, v = qkv") and conflict.line_b == line_of(method, "manual_q = flat_q")
    assert isinstance(report.error, AssertionError) and "after the view" in str(report.error) and report.result is None
    assert report.error_line == line_of(method, "assert torch.allclose(q, manual_q")
    assert (conflict.rows, conflict.common, conflict.wrong) == (128, 64, None)
    assert [(t.name, t.part, str(t.layout)) for t in report.tensors if t.layout] == [
        *((p, p, NEOX) for p in "qkv"),
        *((f"w_{p}", p, GPT2) for p in "qkv"),
        *((f"b_{p}", p, GPT2) for p in "qkv"),
        ("flat_q", "q", GPT2),
        ("manual_q", "q", GPT2),
    ]
    heads = np.arange(4)[:, None] * 96 + np.arange(32)
    assert np.array_equal(named(report, "q").rows, heads.ravel()) and named(report, "q").rows.dtype == np.int64
    assert np.array_equal(named(report, "manual_q").rows, np.arange(128))


def test_the_puzzle_fits_one_screen() -> None:
    model = example().Attention(n_embd=128, n_head=4)
    for truth in (None, NEOX, GPT2):
        lines = str(trace(model.get_q_matrix, torch.randn(2, 5, 128), layout=truth)).splitlines()
        assert len(lines) <= 25 and max(map(len, lines)) <= 80
    assert lines[-6:-1] == [
        "So q is wrong. Mend:",
        "    q, k, v = qkv.unflatten(-1, (3, 4, 32)).unbind(-3)",
        f"Were {NEOX} right, mend manual_q:",
        "    w_q = self.query_key_value.weight.view(4, 3, 32, -1)[:, 0].reshape(128, -1)",
        "    b_q = self.query_key_value.bias.view(4, 3, 32)[:, 0].reshape(-1)",
    ]


def test_the_puzzle_with_grouped_heads() -> None:
    model = example().GroupedAttention(n_embd=16, n_head=64, n_kv_head=8, head_size=128)
    report = trace(model.get_q_matrix, torch.randn(1, 2, 16))
    assert sides(report) == [("q", "manual_q", "g (q r|k|v) d", "(q h|k g|v g) d")]


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example().main()
    out = capsys.readouterr().out
    assert out.count("1 conflict") == 2 and "share 64 of 128 rows" in out


# -- mending lines, run ------------------------------------------------------------------------------------------------

PAIRS = [
    (NEOX, GPT2, {"h": 4, "d": 5}),
    ("g (q r|k|v) d", "(q h|k g|v g) d", {"h": 6, "g": 2, "d": 5}),
    (NEOX, "h d (q|k|v)", {"h": 4, "d": 7}),
    (GPT2, "h d (q|k|v)", {"h": 4, "d": 7}),
    (GPT2, "(q|k|v) d h", {"h": 4, "d": 7}),
    ("t (q n r|k n|v n) d", "(q h|k g|v g) d", {"t": 2, "n": 3, "r": 2, "d": 5}),
    ("m (q|v|k) n d", GPT2, {"m": 4, "n": 2, "d": 5}),
    ("(q g r|k g|v g) d", "(q r g|k g|v g) d", {"g": 3, "r": 2, "d": 5}),
]


@pytest.mark.parametrize(("a", "b", "sizes"), [*PAIRS, *((b, a, s) for a, b, s in PAIRS)])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_mending_lines_do_what_they_say(a: str, b: str, sizes: dict[str, int], part: str) -> None:
    """One side reads the activation as `a`, the other the weight as `b`; each side is mended to the other and run."""
    bound = bind(a, b, **sizes)
    first, second = Layout(a), Layout(b)
    if all(np.array_equal(*(p.rows() for y in (first, second) for p in parts(y, bound) if part in p.path.names)) for _ in "1"):
        return  # this part lies alike in both
    rows, (heads, dims) = first.size(**bound), next(p.shape for p in parts(first, bound) if part in p.path.names)
    module = whole_numbers(nn.Linear(E, rows))
    reads = read_lines(first, bound, "fused", batch=None)
    head = ["def user(x, weight, bias):", "    fused = F.linear(x, weight, bias)", *(f"    {line}" for line in reads)]
    mid = [f"    w = {part_line(second, bound, part)}", f"    c = {part_line(second, bound, part, 'bias', bias=True)}"]
    end = [f"    manual_{part} = F.linear(x, w, c).unflatten(-1, ({heads}, {dims}))", f"    return {part}, manual_{part}"]
    where: dict[str, Any] = {"F": F, "torch": torch}
    exec("\n".join([*head, *mid, *end]), where)

    report = trace(where["user"], tokens(), module.weight, module.bias, layout=a)
    (conflict,) = [c for c in report.conflicts if c.part == part]
    assert (conflict.a, conflict.b, str(conflict.layout_a), conflict.wrong) == (part, f"manual_{part}", a, "b")
    theirs, ours = report.result
    assert not torch.equal(theirs, ours)

    lines = [f"    {line}" for line in conflict.fix_b.splitlines()]
    text = "\n".join([*head, *mid, *lines, *end])
    exec(text.replace("F.linear(x, w, c)", f"F.linear(x, w_{part}, b_{part})") if "w_" in conflict.fix_b else text, where)
    mended = where["user"](tokens(), module.weight, module.bias)
    assert torch.equal(mended[0], theirs) and torch.equal(mended[1], theirs), conflict.fix_b

    if conflict.layout_b is not None and str(conflict.layout_b) == b:
        lines = [f"    {line}" for line in conflict.fix_a.splitlines()]
        exec("\n".join([*head, *lines, *mid, *end]), where)
        mended = where["user"](tokens(), module.weight, module.bias)
        assert torch.equal(mended[0], ours) and torch.equal(mended[1], ours), conflict.fix_a


def mended(fn: Callable[..., Any], conflict: Conflict, which: str, **where: Any) -> dict[str, Any]:
    scope = {"torch": torch, "F": F, **where}
    exec(conflict.fix_a if which == "a" else conflict.fix_b, scope)
    return scope


def test_mending_lines_with_heads_before_tokens_and_a_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    proj = whole_numbers(Conv1D(3 * H * D, E))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        qkv = proj(x)
        q = qkv.view(B, S, H, 3, D).transpose(1, 2)[..., 0, :]
        w_q, b_q = proj.weight[:, : H * D], proj.bias[: H * D]
        q2 = (x @ w_q + b_q).view(B, S, H, D).transpose(1, 2)
        return q, q2

    report = trace(run, tokens())
    assert sides(report) == [("q", "q2", NEOX, GPT2)]
    q, q2 = report.result
    qkv = proj(tokens())
    assert torch.equal(mended(run, report.conflicts[0], "a", qkv=qkv)["q"], q2)
    scope = mended(run, report.conflicts[0], "b", proj=proj)
    assert torch.equal((tokens() @ scope["w_q"] + scope["b_q"]).view(B, S, H, D).transpose(1, 2), q)


def test_mending_lines_use_what_a_name_holds_last() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = LINEAR(x)
        qkv = qkv.view(*qkv.size()[:-1], H, 3 * D)
        query = qkv[..., :D]
        manual = LINEAR(x).chunk(3, -1)[0]
        manual_query = manual.view(query.size())
        return qkv, query, manual_query

    report = trace(run, tokens())
    assert sides(report) == [("query", "manual_query", NEOX, GPT2)]
    qkv, query, manual_query = report.result
    assert torch.equal(mended(run, report.conflicts[0], "a", qkv=qkv)["query"], manual_query)
    assert torch.equal(mended(run, report.conflicts[0], "b", qkv=LINEAR(tokens()))["manual_query"], query)


def test_a_tensor_of_no_layout_is_mended_to_the_other() -> None:
    report = trace(tokens_for_heads, tokens())
    (conflict,) = report.conflicts
    assert conflict.fix_a == "" and conflict.note_b == "all q rows" and "no layout" in str(report)
    q = LINEAR(tokens())[..., : H * D].view(B, S, H, D).transpose(1, 2)
    assert torch.equal(mended(tokens_for_heads, conflict, "b", qkv=LINEAR(tokens()))["wrong_q"], q)
    assert named(report, "wrong_q").note == "other rows along each of axes 1, 2, 3, all q rows"


def test_the_mended_functions_have_no_conflict() -> None:
    proj = whole_numbers(nn.Linear(E, 3 * H * D))

    def neox(x: Tensor) -> None:
        qkv = proj(x)
        q, k, v = qkv.view(B, S, H, 3 * D).split(D, -1)
        w_q = proj.weight.view(H, 3, D, -1)[:, 0].reshape(H * D, -1)
        b_q = proj.bias.view(H, 3, D)[:, 0].reshape(-1)
        manual_q = F.linear(x, w_q, b_q).view(B, S, H, D)
        assert torch.equal(q, manual_q) and k is not v

    def gpt2(x: Tensor) -> None:
        qkv = proj(x)
        q, k, v = qkv.unflatten(-1, (3, H, D)).unbind(-3)
        w_q, w_k, w_v = proj.weight.chunk(3)
        manual_q = F.linear(x, w_q, proj.bias[: H * D]).view(B, S, H, D)
        assert torch.equal(q, manual_q) and k is not v and w_k is not w_v

    for code, layout in ((neox, NEOX), (gpt2, GPT2)):
        report = trace(code, tokens())
        assert report.error is None and not report.conflicts and not report.findings
        assert str(named(report, "manual_q").layout) == str(named(report, "q").layout) == layout
        assert str(report).endswith("No conflicts.")


# -- what is a conflict, and what is none ------------------------------------------------------------------------------

LINEAR = whole_numbers(nn.Linear(E, 3 * H * D))
GQA = whole_numbers(nn.Linear(E, (6 + 2 + 2) * D))


def both_sides_all_parts(x: Tensor) -> None:
    qkv = LINEAR(x)
    q, k, v = qkv.view(B, S, H, 3, D).unbind(-2)
    q2, k2, v2 = (F.linear(x, w, b).view_as(q) for w, b in zip(LINEAR.weight.chunk(3), LINEAR.bias.chunk(3), strict=True))


def inline_slice(x: Tensor) -> None:
    query = LINEAR(x).view(B, S, H, 3 * D)[..., :D]
    manual_query = F.linear(x, LINEAR.weight[: H * D], LINEAR.bias[: H * D]).view(query.shape)


def activation_twice(x: Tensor) -> None:
    mixed = LINEAR(x)
    q_a = mixed.view(B, S, H, 3, D)[:, :, :, 0]
    q_b = mixed.view(B, S, 3, H, D)[:, :, 0]


def weights_only(x: Tensor) -> None:
    w_q = LINEAR.weight[: H * D]
    w_query = LINEAR.weight.view(H, 3, D, E)[:, 0].flatten(0, 1)


def scrambled(x: Tensor) -> None:
    qkv = LINEAR(x)
    q = qkv.view(B, S, 3 * D, H).split(D, -2)[0]
    manual_q = F.linear(x, LINEAR.weight[: H * D], LINEAR.bias[: H * D]).view(B, S, H, D)


def helper(fused: Tensor) -> Tensor:
    cut = fused.view(B, S, H, 3, D)
    return cut.select(-2, 0)


def through_helpers(x: Tensor) -> None:
    q = helper(LINEAR(x))
    q_manual = F.linear(x, LINEAR.weight.chunk(3)[0], LINEAR.bias.chunk(3)[0]).view(B, S, H, D)


def grouped(x: Tensor) -> None:
    y = GQA(x)
    q, k, v = y.view(B, S, 2, 5, D).split([3, 1, 1], 3)
    k_rep = k.expand(B, S, 2, 3, D).reshape(B, S, 6, D)
    q_flat, k_flat, v_flat = y.split([6 * D, 2 * D, 2 * D], -1)
    value = v_flat.view(B, S, 2, D)


def tokens_for_heads(x: Tensor) -> None:
    q = LINEAR(x)[..., : H * D].view(B, S, H, D).transpose(1, 2)
    wrong_q = LINEAR(x).chunk(3, -1)[0].reshape(B, H, S, D)


CONFLICTS: list[tuple[Callable[..., Any], list[tuple[str, str, str, str]]]] = [
    (both_sides_all_parts, [(p, f"{p}2", NEOX, GPT2) for p in "qkv"]),
    (inline_slice, [("query", "manual_query", NEOX, GPT2)]),
    (activation_twice, [("q_a", "q_b", NEOX, GPT2)]),
    (weights_only, [("w_q", "w_query", GPT2, NEOX)]),
    (scrambled, [("q", "manual_q", "(q|k|v) d h", GPT2)]),
    (tokens_for_heads, [("q", "wrong_q", GPT2, "None")]),
    (through_helpers, [("q", "q_manual", NEOX, GPT2)]),
    (grouped, [("q", "q_flat", "g (q r|k|v) d", "(q h|k g|v g) d"), ("k", "k_flat", "g (q r|k|v) d", "(q h|k g|v g) d"),
               ("v", "value", "g (q r|k|v) d", "(q h|k g|v g) d")]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "expected"), CONFLICTS, ids=lambda value: getattr(value, "__name__", ""))
def test_conflicts(code: Callable[..., Any], expected: list[tuple[str, str, str, str]]) -> None:
    report = trace(code, tokens())
    assert report.error is None and sides(report) == expected
    for conflict in report.conflicts:
        assert (conflict.fix_a or not conflict.layout_b) and (conflict.fix_b or not conflict.layout_a)


def neox_correct(x: Tensor) -> None:
    q, k, v = LINEAR(x).view(B, S, H, 3 * D).split(D, -1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = (q @ k.transpose(-1, -2)).softmax(-1) @ v


def rotary_reorder(x: Tensor) -> None:
    q, k, v = LINEAR(x).view(B, S, 3, H, D).unbind(2)
    order = torch.tensor([0, 2, 4, 1, 3])
    q_halves = q[..., order]
    k = k[..., order].contiguous()
    q_rot, q_pass = q[..., :2], q[..., 2:]
    q_even, q_odd = q[..., 0::2], q[..., 1::2]


def grouped_correct(x: Tensor) -> None:
    y = GQA(x).view(B, S, 2, 5, D)
    q, k, v = y[..., :-2, :], y[..., [-2], :], y[..., [-1], :]
    key, value = (t.repeat_interleave(3, -2).flatten(2, 3) for t in (k, v))
    query = q.reshape(B, S, 6, D)


def converted(x: Tensor) -> None:
    weight = LINEAR.weight.view(H, 3, D, E).transpose(0, 1).reshape(-1, E)
    bias = LINEAR.bias.view(H, 3, D).transpose(0, 1).reshape(-1)
    w_q, w_k, w_v = weight.chunk(3)
    q = LINEAR(x).view(B, S, H, 3, D)[..., 0, :]
    q2 = F.linear(x, w_q, bias[: H * D]).view(B, S, H, D)


def sharded(x: Tensor) -> None:
    shards = LINEAR.weight.chunk(2)
    q_shards = [F.linear(x, w).view(B, S, 2, 3, D)[..., 0, :] for w in shards]
    q = torch.cat(q_shards, 2)
    query = LINEAR(x).view(B, S, H, 3, D)[..., 0, :]


def blocks_of_memory(x: Tensor) -> None:
    y = LINEAR(x)
    blocks = y.chunk(3, -1)
    first = y[..., : H * D]
    w0, w1, w2 = LINEAR.weight.chunk(3)
    q, k, v = y.view(B, S, H, 3, D).unbind(-2)


def two_ways_to_the_same(x: Tensor) -> None:
    flat_q = F.linear(x, LINEAR.weight[: H * D], LINEAR.bias[: H * D])
    q, k, v = LINEAR(x).chunk(3, -1)
    assert torch.equal(q, flat_q)
    q, manual_q = q.view(B, S, H, D).transpose(1, 2), flat_q.view(B, S, H, D).transpose(1, 2)


CORRECT = [neox_correct, rotary_reorder, grouped_correct, converted, sharded, blocks_of_memory, two_ways_to_the_same]


@pytest.mark.parametrize("code", CORRECT, ids=lambda code: code.__name__)
def test_correct_code_has_no_conflict(code: Callable[..., Any]) -> None:
    report = trace(code, tokens())
    assert report.error is None and not report.conflicts


# -- what a tensor holds, in words -------------------------------------------------------------------------------------


def test_layouts_parts_and_notes() -> None:
    def run(x: Tensor) -> None:
        qkv = LINEAR(x)
        q, k, v = qkv.view(B, S, H, 3, D).unbind(-2)
        first = qkv[..., : 3 * D + 2 * D]
        one = qkv[0, 0, 17]
        scores = q @ k.transpose(-1, -2)
        turned = q + q.roll(1, -1)
        padded = F.pad(v, (0, 1))

    report = trace(run, tokens(), layout=NEOX)
    notes = {t.name: t.note for t in report.tensors}
    line = line_of(run, "scores =")
    assert notes["first"] == "q rows of heads 0 and 1, k rows of heads 0 and 1, v rows of head 0"
    assert notes["one"] == "1 of the 5 q rows of head 1" and named(report, "one").rows.tolist() == [17]
    assert notes["scores"] == f"mixed by matmul (line {line})"
    assert notes["turned"] == f"mixed by add (line {line + 1})"
    assert notes["padded"] == "all v rows, 4 of 24 elements are none of its rows"
    assert notes["qkv"] == "all 60 rows, in order"
    assert (named(report, "v").part, str(named(report, "v").layout), named(report, "v").shape) == ("v", NEOX, (B, S, H, D))
    assert -1 in named(report, "padded").rows and named(report, "scores").layout is None


def test_the_issue_s_sentence() -> None:
    def run(x: Tensor) -> None:
        q, k, v = LINEAR(x).view(B, S, H, 3, D).unbind(-2)
        y = LINEAR(x)[..., [*range(5), *range(15, 20), *range(5, 10)]]

    assert named(trace(run, tokens()), "y").note == "q rows of heads 0 and 1, k rows of head 0"


def test_a_bias_of_other_rows_is_reported() -> None:
    def run(x: Tensor) -> None:
        w_k, b_q = LINEAR.weight[20:40], LINEAR.bias[:20]
        k = F.linear(x, w_k, b_q)

    report = trace(run, tokens())
    assert report.findings == (f"bias of row 0 added to row 20 (20 rows in all) (line {line_of(run, 'k = F')})",)
    assert f"! {report.findings[0]}" in str(report)


def test_names_lines_and_buffers() -> None:
    def run(x: Tensor) -> Tensor:
        parts = LINEAR(
            x,
        ).chunk(3, -1)
        q, k, v = parts
        out = {"key": k.clone()}
        for i in range(2):
            head = q[..., i * D : (i + 1) * D]
        cache = torch.zeros(2, B, S, H * D, dtype=torch.float64)
        cache[0] = v
        double = lambda t: t.mul(2)  # noqa: E731
        q = double(q)
        return q.view(B, S, H, D)

    report = trace(run, tokens())
    start = line_of(run, "parts =")
    seen = [(t.names, t.line - start) for t in report.tensors if t.function == "run"]
    assert seen == [
        (("q", "parts[0]"), 3),
        (("k", "parts[1]"), 3),
        (("v", "parts[2]"), 3),
        (("out['key']",), 4),
        (("head",), 6),
        (("head",), 6),
        (("cache",), 8),
        (("q",), 10),
        (("returned",), 11),
    ]
    assert named(report, "cache").rows.tolist() == [*range(40, 60)] and named(report, "cache").note == "not everywhere"
    assert [t.rows[0] for t in report.tensors if t.name == "head"] == [0, D]


def test_only_the_users_functions_are_named() -> None:
    from einops import rearrange

    def run(x: Tensor) -> None:
        q, k, v = rearrange(LINEAR(x), "b s (h p d) -> p b h s d", h=H, p=3)
        out = F.multi_head_attention_forward

    report = trace(run, tokens())
    assert {t.function for t in report.tensors} == {"run"} and str(named(report, "k").layout) == NEOX


@pytest.mark.parametrize(
    ("name", "role"),
    [("q", "q"), ("manual_q", "q"), ("queryLayer", "q"), ("wk", "k"), ("key_states", "k"), ("value2", "v"), ("b_v", "v"), ("xq", "q"),
     ("query_key_value", None), ("qkv", None), ("kv", None), ("parts[0]", None), ("out['q']", "q"), ("block", None), ("gate", "gate")],
)  # fmt: skip
def test_roles_of_names(name: str, role: str | None) -> None:
    assert role_of(name) == role


def test_names_read_by_a_statement() -> None:
    def run(x: Tensor, q: Tensor, flat: Tensor) -> Tensor:
        return torch.add(
            x,
            flat,
        ).view(q.shape)

    assert names_read(run.__code__, run.__code__.co_firstlineno + 1) == {"x", "flat"}


# -- the truth ---------------------------------------------------------------------------------------------------------


def test_layout_given_says_who_is_wrong() -> None:
    for truth, wrong, name in ((NEOX, "b", "manual_q"), (GPT2, "a", "q")):
        report = trace(example().Attention(128, 4).get_q_matrix, torch.randn(2, 5, 128), layout=Layout(truth))
        assert report.conflicts[0].wrong == wrong and f"So {name} is wrong." in str(report)
        assert f"{truth} is right: layout= says so." in str(report)


def test_one_wrong_reading_alone_is_told_when_the_truth_is_known() -> None:
    def run(x: Tensor) -> None:
        q, k, v = LINEAR(x).chunk(3, -1)

    report = trace(run, tokens(), layout=NEOX)
    assert not report.conflicts and f"But q, k, v (line {report.tensors[0].line}) are q, k, v of {GPT2}." in str(report)


def test_what_would_tell() -> None:
    text = str(trace(example().Attention(128, 4).get_q_matrix, torch.randn(2, 5, 128)))
    assert "cannot tell" in text and "model_type" in text and "triptych detect" in text


def neox_attention() -> tuple[nn.Module, dict[str, Any]]:
    config = GPTNeoXConfig(hidden_size=24, num_attention_heads=3, num_hidden_layers=1, vocab_size=50, attn_implementation="eager")
    x = torch.randn(B, S, 24)
    return GPTNeoXAttention(config, layer_idx=0), {
        "hidden_states": x,
        "attention_mask": None,
        "position_embeddings": GPTNeoXRotaryEmbedding(config)(x, torch.arange(S)[None]),
    }


def falcon_attention(**sizes: Any) -> tuple[nn.Module, dict[str, Any]]:
    config = FalconConfig(hidden_size=48, num_attention_heads=6, num_hidden_layers=1, vocab_size=50, bias=True, alibi=False, **sizes)
    config._attn_implementation = "eager"
    x = torch.randn(B, S, 48)
    return FalconAttention(config, layer_idx=0), {
        "hidden_states": x,
        "alibi": None,
        "attention_mask": torch.zeros(B, 1, S, S),
        "position_embeddings": FalconRotaryEmbedding(config)(x, torch.arange(S)[None]),
    }


def gpt2_attention() -> tuple[nn.Module, dict[str, Any]]:
    config = GPT2Config(n_embd=24, n_head=3, n_layer=1, attn_implementation="eager")
    return GPT2Attention(config, layer_idx=0), {"hidden_states": torch.randn(B, S, 24)}


@pytest.mark.parametrize(
    ("make", "layout", "family", "names"),
    [
        (gpt2_attention, GPT2, "gpt2", ("query_states", "key_states", "value_states")),
        (neox_attention, NEOX, "gpt_neox", ("query_states", "key_states", "value_states")),
        (
            functools.partial(falcon_attention, new_decoder_architecture=True, num_kv_heads=2),
            "g (q r|k|v) d",
            "falcon",
            ("query", "key", "value"),
        ),
        (
            functools.partial(falcon_attention, new_decoder_architecture=False, multi_query=True),
            "(q h|k g|v g) d",
            "falcon",
            ("query_layer", "key_layer", "value_layer"),
        ),
        (
            functools.partial(falcon_attention, new_decoder_architecture=False, multi_query=False),
            NEOX,
            "falcon",
            ("query_layer", "key_layer", "value_layer"),
        ),
    ],
)
def test_attention_of_transformers(make: Callable[[], Any], layout: str, family: str, names: tuple[str, ...]) -> None:
    module, kwargs = make()
    module.eval()
    alone = module(**kwargs)
    report = trace(module, **kwargs)
    assert report.error is None and not report.conflicts and torch.equal(report.result[0], alone[0])
    for name, part in zip(names, "qkv", strict=True):
        tensor = next(t for t in report.tensors if name in t.names)
        assert (tensor.part, tensor.layout) == (part, report.truth), name
    assert parts_of(report.truth, report.rows) == parts_of(Layout(layout), report.rows)
    assert report.truth_source.startswith(family) and "transformers" in report.truth_source


def parts_of(layout: Layout | None, rows: int) -> list[list[int]]:
    assert layout is not None
    sizes = {24 * 3: {"h": 3, "d": 8}, 80: {"h": 6, "g": 2, "d": 8}, 64: {"h": 6, "g": 1, "d": 8}, 144: {"h": 6, "d": 8}}[rows]
    sized = bind(layout, rows=rows, **sizes)
    return [part.rows().tolist() for part in sorted(parts(layout, sized), key=lambda part: part.path.names)]


def test_multihead_attention_says_what_stops_it() -> None:
    module, x = nn.MultiheadAttention(24, 3, batch_first=True).eval(), torch.randn(B, S, 24)
    for grad, op in ((True, "matmul"), (False, "multi_head_attention")):
        with torch.set_grad_enabled(grad):
            alone = module(x, x, x, need_weights=False)[0]
            report = trace(module, x, x, x, need_weights=False)
        assert torch.equal(report.result[0], alone)
        assert named(report, "returned[0]").note in (f"mixed by {op}", "mixed by scaled_dot_product_attention")
    assert str(report.truth) == GPT2


# -- finding the projection --------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.up = nn.Linear(E, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(q + k + v)

    def method(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return q


def uses_weight(weight: Tensor, bias: Tensor, x: Tensor) -> None:
    q, k, v = F.linear(x, weight, bias).chunk(3, -1)


def uses_state(state: dict[str, Tensor], x: Tensor) -> None:
    q = F.linear(x, state["attn.qkv.weight"], state["attn.qkv.bias"])[..., :E]


def uses_fused(qkv: Tensor) -> None:
    q, k, v = qkv.chunk(3, -1)


def uses_global(x: Tensor) -> None:
    q, k, v = LINEAR(x).chunk(3, -1)


def calls_it(x: Tensor) -> None:
    uses_global(x)


class Holder:
    def __init__(self) -> None:
        self.wqkv = nn.Linear(E, 3 * E)

    def __call__(self, x: Tensor) -> Tensor:
        q = self.wqkv(x)[..., :E]
        return q


def test_the_projection_is_found_by_itself() -> None:
    block, x, weight, bias = Block(), torch.randn(B, S, E), torch.randn(3 * E, E), torch.randn(3 * E)
    inner = nn.Linear(E, 3 * E)

    def closure(x: Tensor) -> None:
        q, k, v = inner(x).chunk(3, -1)

    state = {"attn.qkv.weight": weight, "attn.qkv.bias": bias, "mlp.weight": torch.randn(3 * E, E)}
    cases: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
        (block, (x,), "self.qkv.weight"),
        (block.method, (x,), "self.qkv.weight"),
        (lambda m, x: m.method(x), (block, x), "m.qkv.weight"),
        (lambda x: block(x), (x,), "block.qkv.weight"),
        (closure, (x,), "inner.weight"),
        (uses_global, (x.double(),), "LINEAR.weight"),
        (calls_it, (x.double(),), "LINEAR.weight"),
        (uses_weight, (weight, bias, x), "weight"),
        (functools.partial(uses_weight, weight, bias), (x,), "weight"),
        (uses_state, (state, x), "state['attn.qkv.weight']"),
        (uses_fused, (torch.randn(B, S, 3 * E),), "qkv"),
        (uses_fused, (torch.randn(S, 3 * E),), "qkv"),
        (Holder(), (x,), "self.wqkv.weight"),
        (nn.Sequential(nn.LazyLinear(E), Block()), (x,), "self.1.qkv.weight"),
    ]
    for fn, args, expected in cases:
        report = trace(fn, *args)
        assert (report.fused, report.error) == (expected, None)
        assert str(named(report, "q").layout) == GPT2 and named(report, "q").part == "q", expected


@pytest.mark.parametrize("fused", ["up", "self.up", "up.weight", "self.up.weight"])
def test_the_projection_is_named(fused: str) -> None:
    assert trace(Block(), torch.randn(B, S, E), fused=fused).fused == "self.up.weight"


def test_the_projection_is_given() -> None:
    block, x = Block(), torch.randn(B, S, E)
    for fused in (block.qkv, block.qkv.weight):
        report = trace(block, x, fused=fused)
        assert report.fused == "self.qkv.weight" and not report.findings and named(report, "q").part == "q"
    report = trace(lambda x: F.linear(x, block.qkv.weight.detach())[..., :E], x, fused=block.qkv.weight.detach())
    assert named(report, "returned").part == "q"


def test_a_choice_is_asked_for() -> None:
    model = GPT2Model(GPT2Config(n_embd=24, n_head=3, n_layer=13, vocab_size=50, bos_token_id=0, eos_token_id=0))
    with pytest.raises(TraceError, match="13 projections could be meant") as raised:
        trace(model, torch.arange(5)[None])
    text = raised.value.text()
    assert 'fused="h.0.attn.c_attn"' in text and "h.3.attn.c_attn  (24, 72)" in text and "and 1 more" in text
    report = trace(model, torch.arange(5)[None], fused="h.3.attn.c_attn")
    assert next(t for t in report.tensors if t.name == "query_states").part == "q" and "in forward, modeling_gpt2.py" in str(report)


@pytest.mark.parametrize(
    ("fn", "kwargs", "message"),
    [
        (lambda x: x, {}, "no fused projection found"),
        (lambda x: x, {"fused": "attn.qkv"}, "no projection is called 'attn.qkv'"),
        (Block(), {"fused": "qk"}, "did you mean 'qkv'"),
        (Block(), {"fused": nn.ReLU()}, "ReLU has no weight"),
        (Block(), {"fused": 3}, "a tensor, a module or a name"),
        (3, {}, "takes a function"),
        (Block(), {"layout": "h (q|k|v"}, "never closed"),
    ],
)
def test_errors(fn: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError if "layout" in kwargs else TraceError) as raised:
        trace(fn, torch.randn(B, S), **kwargs)
    assert message in str(raised.value) and len(str(raised.value).splitlines()) <= 6


def test_a_layout_that_does_not_fit_is_told() -> None:
    report = trace(uses_global, tokens(), layout="h (q|k|v|gate) c d2")
    assert report.findings == ("h (q|k|v|gate) c d2 fits 60 rows at none of the sizes seen: no module here names heads",)


# -- as if it had run alone --------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Dropout, a buffer, hooks, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)
        self.register_buffer("count", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, fail: bool = False) -> dict[str, Any]:
        self.count += 1
        q, k, v = self.drop(self.qkv(x)).view(B, S, H, 3, D).unbind(-2)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=0.1)
        noise = torch.rand(2)
        if fail:
            raise ValueError(f"as asked {int(self.count)}")
        return {"out": out, "noise": noise, "views": [q, k]}


def run_alone_or_traced(traced: bool, fail: bool) -> tuple[Any, ...]:
    torch.manual_seed(7)
    module, calls = Stateful(), []
    module.qkv.register_forward_hook(lambda m, i, o: calls.append("forward") or o * 2)
    module.qkv.weight.register_hook(lambda g: calls.append("backward"))
    x = torch.randn(B, S, E, requires_grad=True)
    error = result = None
    if traced:
        report = trace(module, x, fail=fail)
        result, error = report.result, report.error
    else:
        try:
            result = module(x, fail=fail)
        except ValueError as raised:
            error = raised
    if result is not None:
        (result["out"].sum() + result["views"][0].sum()).backward()
    state = [p.detach().clone() for p in (*module.parameters(), *module.buffers())]
    grads = [None if p.grad is None else p.grad.clone() for p in (*module.parameters(), x)]
    facts = [str(error), calls, [p._version for p in module.parameters()], list(module.__dict__), type(result)]
    return state, grads, [] if result is None else [result["out"], result["noise"]], [torch.rand(3)], facts


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_else_changes(fail: bool) -> None:
    alone, traced = run_alone_or_traced(False, fail), run_alone_or_traced(True, fail)
    assert alone[4] == traced[4]
    for one, two in zip(alone[:4], traced[:4], strict=True):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_the_traceback_is_the_users() -> None:
    report = trace(Stateful(), torch.randn(B, S, E), fail=True)
    assert isinstance(report.error, ValueError) and report.error_line == line_of(Stateful.forward, "raise ValueError")
    files = {frame.tb_frame.f_code.co_filename for frame in frames(report.error.__traceback__)}
    assert not any("triptych/live" in file for file in files)
    assert any(t.name == "out" for t in report.tensors), "what was seen before the error is kept"


def frames(traceback: Any) -> Any:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def test_other_exceptions_pass_and_everything_is_put_back() -> None:
    def run(x: Tensor) -> None:
        q = LINEAR(x)
        raise KeyboardInterrupt

    before = sys.gettrace()
    with pytest.raises(KeyboardInterrupt):
        trace(run, tokens())
    assert sys.gettrace() is before
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_debugger_or_coverage_keeps_running() -> None:
    events: list[tuple[str, str, int]] = []

    def tracer(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_name in ("uses_global", "forward"):
            events.append((frame.f_code.co_name, event, frame.f_lineno))
        if event == "call":
            sys.settrace(tracer)  # as coverage's tracer in C does
        return tracer

    before = sys.gettrace()
    try:
        sys.settrace(tracer)
        uses_global(tokens())
        alone = events.copy()
        events.clear()
        report = trace(uses_global, tokens())
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is tracer and events == alone and len(alone) > 4
    assert named(report, "q").part == "q"


def test_a_users_function_mode_sees_no_more() -> None:
    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    calls: list[str] = []
    x = tokens()
    with Watch():
        uses_global(x)
    alone = calls.copy()
    calls.clear()

    def run(x: Tensor) -> None:
        with Watch():
            uses_global(x)

    report = trace(run, x, fused=LINEAR)
    assert calls == alone and named(report, "q").part == "q"


def test_a_trace_inside_a_trace() -> None:
    inner: list[Report] = []

    def outer(x: Tensor) -> None:
        inner.append(trace(uses_global, x))
        q, k, v = LINEAR(x).chunk(3, -1)

    report = trace(outer, tokens(), fused=LINEAR)
    assert [t.name for t in inner[0].tensors] == ["q", "k", "v"]
    assert [t.name for t in report.tensors if t.function == "outer"] == ["q", "k", "v"]


def test_autocast_inference_and_compiled_code() -> None:
    module, x = Block(), torch.randn(B, S, E)

    def run(x: Tensor) -> Tensor:
        q, k, v = module.qkv(x).view(B, S, H, 3, D).unbind(-2)
        return q

    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.qkv(x)  # fills the cache of casts
        report = trace(run, x)
        assert report.result.dtype == torch.bfloat16 and named(report, "q").part == "q"
    with torch.inference_mode():
        report = trace(run, x)
        assert report.result.is_inference() and named(report, "v").part == "v"
    compiled = torch.compile(run, backend="eager")
    report = trace(compiled, x, fused=module.qkv)
    assert torch.equal(report.result, compiled(x))


# -- the report --------------------------------------------------------------------------------------------------------


def test_plain_data_and_html() -> None:
    report = trace(example().Attention(128, 4).get_q_matrix, torch.randn(2, 5, 128), layout=NEOX)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["conflicts"][0]["layout_a"] == NEOX and plain["conflicts"][0]["fix_b"] == report.conflicts[0].fix_b
    assert plain["error"]["type"] == "AssertionError" and plain["truth"] == NEOX
    assert plain["tensors"][1]["names"] == ["q"] and len(plain["tensors"][1]["rows"]) == 128
    page = report._repr_html_()
    assert "<table>" in page and "manual_q" in page and "mend" in page.lower()


def test_text_is_escaped() -> None:
    def run(x: Tensor) -> None:
        bad = {"<b>\x1b[31m": LINEAR(x)}
        raise RuntimeError("<script>\x1b[0m")

    report = trace(run, tokens())
    assert "\x1b" not in str(report) and "\x1b" not in report._repr_html_()
    assert "<b>" not in report._repr_html_() and "<script>" not in report._repr_html_()


def test_the_report_holds_no_tensor_alive() -> None:
    import gc
    import weakref

    kept: list[weakref.ref[Tensor]] = []

    def run(x: Tensor) -> None:
        q, k, v = LINEAR(x).chunk(3, -1)
        kept.append(weakref.ref(q))

    report = trace(run, tokens())
    gc.collect()
    assert kept[0]() is None and report.tensors


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(uses_global, tokens())
