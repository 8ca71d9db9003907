"""The shadow against an oracle: the same code on a weight whose row i computes the number i, in float64."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from triptych.live.shadow import Shadow

H, D, IN, B, S = 6, 5, 4, 2, 7
ROWS = 3 * H * D
NUMBERS = torch.arange(ROWS, dtype=torch.float64)
Code = Callable[..., Tensor]


def numbering_weight() -> Tensor:
    weight = torch.zeros(ROWS, IN, dtype=torch.float64)
    weight[:, 0] = NUMBERS
    return weight


def one_hot() -> Tensor:
    x = torch.zeros(B, S, IN, dtype=torch.float64)
    x[..., 0] = 1
    return x


def followed(code: Code, *args: Tensor, weight: Tensor, bias: Tensor | None = None, axis: int = 0) -> tuple[Tensor, Shadow]:
    shadow = Shadow()
    shadow.label(weight, axis)
    if bias is not None:
        shadow.label(bias, kind="bias")
    with shadow:
        out = code(*args)
    return out, shadow


def agrees(code: Code) -> None:
    """`code` takes the activation [B, S, ROWS]."""
    weight = numbering_weight()
    out, shadow = followed(lambda x: code(F.linear(x, weight)), one_hot(), weight=weight)
    rows = shadow.rows(out)
    assert rows is not None and rows.shape == tuple(out.shape)
    assert np.array_equal(rows, out.numpy().astype(np.int64)), "rows differ from the oracle"


MOVES: dict[str, Code] = {
    "view": lambda y: y.view(B, S, H, 3 * D),
    "reshape": lambda y: y.view(B, S, H, 3, D).transpose(2, 3).reshape(B, S, 3, H * D),
    "flatten": lambda y: y.view(B, S, H, 3, D).permute(0, 2, 1, 4, 3).flatten(2),
    "unflatten": lambda y: y.unflatten(-1, (3, H, D)),
    "split": lambda y: y.view(B, S, H, 3 * D).split(D, -1)[1],
    "split sizes": lambda y: y.split([H * D, D, ROWS - H * D - D], -1)[2],
    "chunk": lambda y: y.chunk(3, -1)[2],
    "tensor_split": lambda y: y.tensor_split([7, 40], dim=-1)[1],
    "unbind": lambda y: y.view(B, S, H, 3, D).unbind(-2)[1],
    "narrow": lambda y: y.narrow(-1, 13, 31),
    "slice": lambda y: y[..., 3:70:4],
    "index": lambda y: y[:, :, [5, 3, 80, 3]],
    "index both": lambda y: y[torch.tensor([1, 0])][..., torch.tensor([2, 1, 0])],
    "mask": lambda y: y[..., torch.arange(ROWS) % 3 == 1],
    "select": lambda y: y.view(B, S, 3, H, D).select(2, 1),
    "integer": lambda y: y.view(B, S, 3, H, D)[:, -1, 2],
    "transpose": lambda y: y.view(B, S, H, 3 * D).transpose(1, 2),
    "permute": lambda y: y.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)[0],
    "movedim": lambda y: y.view(B, S, H, D, 3).movedim(-1, 0)[2],
    "swapaxes": lambda y: y.view(B, S, H, D, 3).swapaxes(-1, -2),
    "squeeze": lambda y: y[:1].squeeze(0).unsqueeze(1),
    "expand": lambda y: y.view(B, S, 3 * H, 1, D).expand(B, S, 3 * H, 4, D),
    "broadcast_to": lambda y: torch.broadcast_to(y[:, :, :, None], (B, S, ROWS, 2)),
    "contiguous": lambda y: y.view(B, S, H, 3 * D).transpose(1, 3).contiguous(),
    "clone": lambda y: y.transpose(0, 2).clone(),
    "channels last": lambda y: y.view(B, S, H, -1).contiguous(memory_format=torch.channels_last),
    "to": lambda y: y.to(torch.float32).double(),
    "cat": lambda y: torch.cat([y[..., 50:], y[..., :20]], -1),
    "cat batch": lambda y: torch.cat([y, y.flip(-1)], 0),
    "stack": lambda y: torch.stack([y[..., :9], y[..., 80:89]], 2),
    "index_select": lambda y: y.index_select(-1, torch.tensor([4, 4, 60])),
    "gather": lambda y: y.gather(-1, torch.arange(8).expand(B, S, 8) * 11),
    "take_along_dim": lambda y: y.take_along_dim(torch.tensor([[[3, 9]]]), -1),
    "flip": lambda y: y.flip(-1, 0),
    "roll": lambda y: y.roll(5, -1),
    "repeat": lambda y: y.repeat(1, 2, 3),
    "tile": lambda y: y.tile(2),
    "repeat_interleave": lambda y: y.view(B, S, 3, H, D).repeat_interleave(4, 3),
    "unfold": lambda y: y.unfold(-1, D, 3),
    "as_strided": lambda y: y.as_strided((S, H), (ROWS, 7), 11),
    "diagonal": lambda y: y.diagonal(dim1=1, dim2=2),
    "masked_select": lambda y: y.masked_select(torch.arange(ROWS) > 70),
    "where": lambda y: torch.where(torch.arange(ROWS) % 2 == 0, y, y.roll(1, -1)),
    "pixel_shuffle": lambda y: F.pixel_shuffle(y.view(B * S, ROWS // 9 * 9, 1, 1), 3),
    "circular pad": lambda y: F.pad(y, (2, 3), mode="circular"),
    "replicate pad": lambda y: F.pad(y, (2, 3), mode="replicate"),
    "rearrange": lambda y: rearrange(y, "b s (h three d) -> three b h s d", three=3, d=D)[1],
    "rearrange joins": lambda y: rearrange(y, "b s (three h d) -> (b s) (h three) d", three=3, d=D),
    "repeat einops": lambda y: repeat(y, "b s (g d) -> b s (g r) d", d=D, r=2),
    "dsplit": lambda y: y.dsplit(3)[1],
    "slice_scatter": lambda y: y.slice_scatter(y[..., 60:70], -1, 0, 10),
    "index_copy": lambda y: y.index_copy(-1, torch.tensor([1, 0]), y[..., 8:10]),
    "scatter": lambda y: y.scatter(-1, torch.zeros(B, S, 1, dtype=torch.long), y[..., 50:51]),
    "view dtype": lambda y: y.view(torch.int64).view(torch.float64)[..., 4:],
    "buffer": lambda y: fill(y.new_empty(3, B, S, H * D), y),
    "setitem": lambda y: set_items(y.clone()),
    "copy_": lambda y: y.new_empty(S, B, ROWS).copy_(y.transpose(0, 1)),
    "out=": lambda y: torch.cat([y[..., 80:], y[..., :5]], -1, out=y.new_empty(B, S, 15)),
    "vmap": lambda y: torch.vmap(lambda one: one.view(S, 3, H * D)[:, 1])(y),
    "checkpoint": lambda y: torch.utils.checkpoint.checkpoint(lambda t: t[..., 9:].contiguous(), y, use_reentrant=False),
    "named tuple": lambda y: torch.functional.split(y, 30, dim=-1)[1],
}


def fill(buffer: Tensor, y: Tensor) -> Tensor:
    for i, part in enumerate(y.chunk(3, -1)):
        buffer[2 - i] = part
    return buffer


def set_items(y: Tensor) -> Tensor:
    y[..., :4] = y[..., 40:44].clone()
    y[1, :, torch.tensor([7, 8])] = y[1, :, [70, 71]]
    y[:, 0][:, y[0, 0] > 85] = y[:, 0, 20:24]
    return y


@pytest.mark.parametrize("name", MOVES)
def test_every_move_agrees_with_the_oracle(name: str) -> None:
    agrees(MOVES[name])


def test_the_oracle_can_fail() -> None:
    with pytest.raises(AssertionError, match="rows differ"):
        weight = numbering_weight()
        out, shadow = followed(lambda x: F.linear(x, weight), one_hot(), weight=weight)
        assert np.array_equal(shadow.rows(out), out.flip(-1).numpy()), "rows differ"


STEPS: list[Callable[[Tensor, int, int, int], Tensor]] = [
    lambda y, dim, cut, other: y.transpose(dim, other),
    lambda y, dim, cut, other: y.narrow(dim, y.size(dim) - cut, cut),
    lambda y, dim, cut, other: y.flip(dim).contiguous(),
    lambda y, dim, cut, other: y.roll(cut, dim),
    lambda y, dim, cut, other: torch.cat([y.narrow(dim, 0, cut), y], dim) if y.numel() < 4000 else y,
    lambda y, dim, cut, other: y.unflatten(dim, (cut, -1)) if y.size(dim) % cut == 0 and y.dim() < 6 else y,
    lambda y, dim, cut, other: y.flatten(min(dim, other), max(dim, other)),
    lambda y, dim, cut, other: y.select(dim, cut - 1) if y.dim() > 1 else y,
    lambda y, dim, cut, other: y.index_select(dim, torch.tensor([cut - 1, 0, y.size(dim) - 1])),
    lambda y, dim, cut, other: y.clone(),
    lambda y, dim, cut, other: y.reshape(-1),
]


@given(st.data())
@settings(derandomize=True, max_examples=40, deadline=None)
def test_chains_of_moves_agree_with_the_oracle(data: st.DataObject) -> None:
    def chain(y: Tensor) -> Tensor:
        for _ in range(data.draw(st.integers(1, 6))):
            dim = data.draw(st.integers(0, y.dim() - 1))
            cut = data.draw(st.integers(1, y.size(dim)))
            y = data.draw(st.sampled_from(STEPS))(y, dim, cut, data.draw(st.integers(0, y.dim() - 1)))
        return y

    agrees(chain)


LINEAR: dict[str, Code] = {
    "F.linear": lambda x, w, b: F.linear(x, w, b),
    "one token": lambda x, w, b: F.linear(x[0, 0], w, b),
    "tokens": lambda x, w, b: F.linear(x[0], w, b),
    "four axes": lambda x, w, b: F.linear(x[:, :, None], w, b),
    "matmul": lambda x, w, b: x @ w.T + b,
    "matmul then slice": lambda x, w, b: (x @ w.t())[..., 8:40] + b[8:40],
    "weight first": lambda x, w, b: (w @ x.transpose(1, 2)).transpose(1, 2) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x[0], w.T),
    "addmm slice": lambda x, w, b: torch.addmm(b[9:20], x[1], w[9:20].T),
    "mv": lambda x, w, b: torch.mv(w, x[0, 0]) + b,
    "addmv": lambda x, w, b: torch.addmv(b, w, x[0, 0]),
    "bmm": lambda x, w, b: torch.bmm(x, w.T.expand(B, IN, ROWS)) + b,
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x, w.T.expand(B, IN, ROWS)),
    "einsum": lambda x, w, b: torch.einsum("bsi,oi->bso", x, w) + b,
    "einsum per head": lambda x, w, b: torch.einsum("bsi,hpdi->phbsd", x, w.view(H, 3, D, IN))[1] + b.view(H, 3, D)[:, 1, None, None],
    "einsum slice": lambda x, w, b: torch.einsum("bsi,hdi->bhsd", x, w[30:60].view(H, D, IN)) + b[30:60].view(H, 1, D),
    "tensordot": lambda x, w, b: torch.tensordot(x, w, ([2], [1])) + b,
    "slice": lambda x, w, b: F.linear(x, w[30:60], b[30:60]),
    "strided slice": lambda x, w, b: F.linear(x, w.view(H, 3, D, IN)[:, 0].reshape(-1, IN), b.view(H, 3, D)[:, 0].reshape(-1)),
    "chunks joined": lambda x, w, b: F.linear(x, torch.cat(w.chunk(3)[::-1]), torch.cat(b.chunk(3)[::-1])),
    "converted": lambda x, w, b: F.linear(x, *(t.view(H, 3, D, -1).transpose(0, 1).flatten(0, 2).squeeze(-1) for t in (w, b))),
    "index_select": lambda x, w, b: F.linear(x, w.index_select(0, torch.tensor([7, 3])), b[[7, 3]]),
    "conv1d": lambda x, w, b: F.conv1d(x.transpose(1, 2), w[..., None], b).transpose(1, 2),
    "conv2d": lambda x, w, b: F.conv2d(x.permute(2, 0, 1)[None], w[..., None, None], b),
    "by hand": lambda x, w, b: (x[..., None, :] * w).sum(-1) + b,
    "inference": lambda x, w, b: inference(x, w, b),
    "no grad": lambda x, w, b: torch.no_grad()(F.linear)(x, w, b),
    "compiled": lambda x, w, b: torch.compile(F.linear, backend="eager")(x, w, b),
}


@torch.inference_mode()
def inference(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b).view(B, S, H, -1).transpose(1, 2)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("grad", [False, True])
def test_every_linear_map_agrees_with_the_oracle(name: str, grad: bool) -> None:
    weight, bias = numbering_weight().requires_grad_(grad), (NUMBERS * 4096).requires_grad_(grad)
    out, shadow = followed(LINEAR[name], one_hot(), weight, bias, weight=weight, bias=bias)
    assert np.array_equal(shadow.rows(out), (out.detach() / 4097).numpy())
    assert shadow.kind_of(out) == "activation" and not shadow.findings


@pytest.mark.parametrize("make", [lambda: nn.Linear(IN, ROWS), lambda: Conv1D(ROWS, IN)])
def test_modules(make: Callable[[], nn.Module]) -> None:
    module = make().double()
    axis = 1 if isinstance(module, Conv1D) else 0
    with torch.no_grad():
        module.weight.copy_(numbering_weight() if axis == 0 else numbering_weight().T)
        module.bias.copy_(NUMBERS)
    out, shadow = followed(module, one_hot(), weight=module.weight, bias=module.bias, axis=axis)
    assert np.array_equal(shadow.rows(out), (out / 2).detach().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_exact_for_ten_thousand_rows_in_every_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(10240, 8, dtype=dtype)
    x = torch.randn(1, 3, 8, dtype=dtype)
    out, shadow = followed(lambda x: F.linear(x, weight).view(1, 3, 8, 10, 128).clone()[:, :, :, 8], x, weight=weight)
    expected = np.arange(10240).reshape(8, 10, 128)[:, 8]
    assert np.array_equal(shadow.rows(out), np.broadcast_to(expected, (1, 3, 8, 128)))


def test_autocast_and_its_cache() -> None:
    module, x = nn.Linear(IN, ROWS), torch.randn(B, S, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, shadow = followed(module, x, weight=module.weight, bias=module.bias)
    assert out.dtype == torch.bfloat16 and np.array_equal(shadow.rows(out)[0, 0], np.arange(ROWS))


def test_results_and_gradients_are_bit_equal_to_a_run_alone() -> None:
    torch.manual_seed(3)
    block = nn.MultiheadAttention(24, 6, batch_first=True, dropout=0.3)
    x = torch.randn(B, S, 24)

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        block.zero_grad()
        out = block(x, x, x)[0]
        out.square().sum().backward()
        return out.detach(), block.in_proj_weight.grad.clone(), torch.rand(3)

    alone = run()
    for seen, expected in zip(followed(run, weight=block.in_proj_weight)[0], alone, strict=True):
        assert torch.equal(seen, expected)


def test_a_large_weight_costs_one_number_a_row() -> None:
    weight = torch.empty(6144, 2048, dtype=torch.bfloat16)
    shadow = Shadow()
    shadow.label(weight)
    with shadow:
        part = weight.view(16, 3, 128, 2048)[:, 1].reshape(2048, 2048).float()
        out = part @ torch.zeros(2048, 3)
    for tensor in (weight, part, out):
        labels = shadow.read(tensor)
        assert labels is not None and labels.untyped_storage().nbytes() <= 4 * 6144


def test_a_new_tensor_in_freed_memory_has_no_labels() -> None:
    weight, shadow = torch.randn(ROWS, IN), Shadow()
    shadow.label(weight)
    with shadow:
        for _ in range(50):
            y = torch.randn(B, S, IN) @ weight.T
            assert shadow.rows(y) is not None
            del y
            gc.collect(0)
            assert shadow.rows(torch.zeros(B, S, ROWS)) is None


def test_writes_are_followed_and_counted() -> None:
    weight, shadow = torch.randn(ROWS, IN), Shadow()
    shadow.label(weight)
    with shadow:
        y = torch.randn(B, IN) @ weight.T
        before = shadow.version(y)
        y *= 2
        y.add_(1)
        assert shadow.version(y) == before
        y[:, :3] = 0
        y[:, 3:5].zero_()
        y[:, 5].fill_(torch.tensor(7.0))
        y[:, 6:8].normal_()
        y[:, 8:10] = torch.randn(B, 2)
        y[:, 10:12].masked_fill_(torch.tensor([True, False]), 0.0)
    rows = shadow.rows(y)
    assert shadow.version(y) > before
    assert np.array_equal(rows[0], np.where((np.arange(ROWS) < 11), -1, np.arange(ROWS)))


def test_templates_and_constants_have_no_labels() -> None:
    weight = torch.randn(ROWS, IN)
    _, shadow = followed(lambda: weight, weight=weight)
    with shadow:
        for made in (torch.zeros_like(weight), weight.new_ones(3, 3), torch.empty_like(weight), weight > 0, weight.argmax(1)):
            assert shadow.rows(made) is None
        assert np.array_equal(shadow.rows(F.pad(weight.T, (1, 0)))[0], np.arange(-1, ROWS))
        assert (shadow.rows(weight.T.tril())[0, 1:] == -1).all()


def test_a_bias_of_other_rows_is_found() -> None:
    weight, bias = torch.randn(ROWS, IN), torch.randn(ROWS)
    for code in (lambda x: F.linear(x, weight[30:60], bias[:30]), lambda x: x @ weight[30:60].T + bias[:30]):
        out, shadow = followed(code, torch.randn(B, IN), weight=weight, bias=bias)
        assert np.array_equal(shadow.rows(out)[1], np.arange(30, 60)), "the weight's row counts"
        assert list(shadow.findings) == ["bias of row 0 added to row 30 (30 rows in all)"]


@pytest.mark.parametrize(
    ("op", "code"),
    [
        ("softmax", lambda y: y.softmax(-1)),
        ("add", lambda y: y + y.roll(1, -1)),
        ("layer_norm", lambda y: F.layer_norm(y, (ROWS,))),
        ("group_norm", lambda y: F.group_norm(y.transpose(1, 2), 3)),
        ("mean", lambda y: y * y.pow(2).mean(-1, keepdim=True).rsqrt()),
        ("matmul", lambda y: y @ y.transpose(1, 2)),
        ("matmul", lambda y: y @ torch.randn(ROWS, 3)),
        ("scaled_dot_product_attention", lambda y: F.scaled_dot_product_attention(*y.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4))),
        ("sort", lambda y: y.sort(-1)[0]),
        ("cumsum", lambda y: y.cumsum(-1)),
        ("fft_r2c", lambda y: torch.fft.rfft(y).real),
    ],
)
def test_what_mixes_rows_is_named(op: str, code: Code) -> None:
    weight = torch.randn(ROWS, IN)
    shadow = Shadow()
    shadow.label(weight)
    with shadow:
        y = torch.randn(B, S, IN) @ weight.T
        shadow.place = "line 7"
        out = code(y)
    rows = shadow.rows(out)
    assert (rows <= -2).all()
    assert {(shadow.mixtures[-2 - m].op, shadow.mixtures[-2 - m].place) for m in rows.ravel().tolist()} == {(op, "line 7")}


@pytest.mark.parametrize(
    "code",
    [
        lambda y: y.softmax(1),
        lambda y: y.mean(1),
        lambda y: y.mean((0, 1)),
        lambda y: y.amax(1, keepdim=True),
        lambda y: y.max(1)[0],
        lambda y: y.cumsum(1),
        lambda y: torch.randn(B, 3, S) @ y,
        lambda y: F.silu(y * 3).clamp(-1, 1),
        lambda y: F.dropout(y, 0.5),
        lambda y: F.conv1d(F.pad(y.transpose(1, 2), (3, 0)), torch.randn(ROWS, 1, 4), groups=ROWS).transpose(1, 2),
        lambda y: F.batch_norm(y.transpose(1, 2), None, None, training=True).transpose(1, 2),
    ],
)
def test_work_along_tokens_keeps_rows(code: Code) -> None:
    weight = torch.randn(ROWS, IN)
    out, shadow = followed(lambda x: code(x @ weight.T), torch.randn(B, S, IN), weight=weight)
    assert np.array_equal(shadow.rows(out), np.broadcast_to(np.arange(ROWS), out.shape))


def test_complex_numbers() -> None:
    """A pair of rows in one number is a mixture; taken apart again it is two rows."""
    weight = torch.randn(ROWS, IN)
    shadow = Shadow()
    shadow.label(weight)
    with shadow:
        y = torch.randn(S, IN) @ weight.T
        pairs = torch.view_as_complex(y.view(S, -1, 2))
        turned = torch.view_as_real(pairs * torch.polar(torch.ones(ROWS // 2), torch.ones(ROWS // 2)))
    assert np.array_equal(shadow.rows(torch.view_as_real(pairs)).reshape(S, -1)[0], np.arange(ROWS))
    for mixed in (pairs, turned):
        assert {shadow.mixtures[-2 - m].op for m in shadow.rows(mixed).ravel().tolist()} == {"a view of several elements as one"}


def test_other_modes_see_only_the_users_operations() -> None:
    module, x = nn.Linear(IN, ROWS), torch.randn(B, S, IN)

    def flops(run: Code) -> int:
        with FlopCounterMode(display=False) as counter:
            run(x)
        return counter.get_total_flops()

    def traced(x: Tensor) -> Tensor:
        return followed(lambda x: torch.cat([module(x)] * 2).softmax(-1), x, weight=module.weight)[0]

    assert flops(traced) == flops(module)


def test_a_default_device_does_not_reach_the_labels() -> None:
    weight = torch.randn(ROWS, IN)
    with torch.device("meta"):
        out, shadow = followed(lambda: (torch.ones(B, IN) @ weight.to("meta").T).view(B, 3, -1)[:, 1], weight=weight)
    assert out.is_meta and np.array_equal(shadow.rows(out)[0], np.arange(30, 60))


def test_higher_order_operations_mix() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    weight = torch.randn(3 * 2 * 16, IN)
    with torch.no_grad():
        out, shadow = followed(
            lambda x: flex_attention(*(x @ weight.T).view(1, 128, 3, 2, 16).permute(2, 0, 3, 1, 4)), torch.randn(1, 128, IN), weight=weight
        )
    assert (shadow.rows(out) <= -2).all()


def test_sparse_and_other_tensors_without_storage_pass() -> None:
    weight = torch.randn(ROWS, IN)
    out, shadow = followed(lambda: (weight.to_sparse() @ torch.ones(IN, 1)).squeeze(), weight=weight)
    assert out.shape == (ROWS,) and shadow.rows(out.to_sparse()) is None


def test_torchs_compiler_is_not_imported() -> None:
    """Loading it takes seconds."""
    import subprocess

    code = (
        "import sys, torch; from triptych.live.shadow import Shadow; s = Shadow(); w = torch.ones(6, 2); s.label(w)\n"
        "with s: y = torch.ones(1, 2) @ w.T; z = y + y.flip(1)\n"
        "assert s.rows(z) is not None and 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
