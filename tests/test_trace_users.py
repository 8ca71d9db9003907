"""`trace` on the code that people bring: quantised modules, compiled methods, one wrong reading in a known family, odd orders of axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triptych as tt

B, S, H, D = 2, 5, 4, 8
E = H * D


class Attention(nn.Module):
    """Reads its projection once per head and once in thirds."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.query_key_value = projection

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, k, _ = self.query_key_value(x).view(B, S, H, 3 * D).split(D, dim=-1)
        k_thirds = self.query_key_value(x).chunk(3, dim=-1)[1].view(B, S, H, D)
        return k, k_thirds

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.both(x)


class FourBits(nn.Linear):
    """Two numbers in a byte, as a matrix [bytes, 1]: the form of bitsandbytes."""

    def __init__(self) -> None:
        super().__init__(E, 3 * E)
        self.decoded = self.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(3 * E * E // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.decoded, self.bias)


class Buffers(nn.Module):
    """No parameter at all, eight numbers in an int32 [in / 8, out]: the form of GPTQ."""

    def __init__(self) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = E, 3 * E
        self.register_buffer("qweight", torch.zeros(E // 8, 3 * E, dtype=torch.int32))
        self.decoded = torch.randn(3 * E, E)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.decoded)


class EightBits(nn.Linear):
    """int8 with one scale for each row: the weight can be labelled as it is."""

    def __init__(self) -> None:
        super().__init__(E, 3 * E)
        scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
        self.scale: Tensor
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((self.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float() * self.scale, self.bias)


@pytest.mark.parametrize("kind", [FourBits, Buffers, EightBits])
def test_quantised_projections(kind: Callable[[], nn.Module]) -> None:
    attention = Attention(kind())
    report = tt.trace(attention.both, torch.randn(B, S, E))
    assert report.rows == 3 * E and not report.findings and report.error is None
    (conflict,) = report.conflicts
    assert (conflict.a, str(conflict.layout_a), conflict.b, str(conflict.layout_b)) == ("k", "h (q|k|v) d", "k_thirds", "(q|k|v) h d")
    assert "self.query_key_value" in report.fused and not attention.query_key_value._forward_hooks
    named = tt.trace(attention.both, torch.randn(B, S, E), fused=attention.query_key_value)
    assert str(named) == str(report)


def test_a_compiled_method_is_the_method_that_it_was_made_of() -> None:
    attention = Attention(nn.Linear(E, 3 * E))
    plain = tt.trace(attention.both, torch.randn(B, S, E))
    assert str(tt.trace(torch.compile(attention.both, backend="eager"), torch.randn(B, S, E))) == str(plain)
    assert len(plain.conflicts) == 1


def attention_of(family: str) -> Any:
    import transformers

    if family == "gpt_neox":
        from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

        kind: Any = GPTNeoXAttention
        return kind(transformers.GPTNeoXConfig(hidden_size=48, num_attention_heads=3), layer_idx=0)
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    kind = GPT2Attention
    return kind(transformers.GPT2Config(n_embd=48, n_head=3), layer_idx=0)


def run_fix(fix: str, **names: Any) -> dict[str, Any]:
    scope: dict[str, Any] = {**names, "torch": torch}
    exec(fix, scope)
    return scope


def test_one_wrong_reading_of_a_known_family_is_mended() -> None:
    """Nothing to compare with but the family's record: what `get_q` returns is taken for q, whatever its names are."""
    neox = attention_of("gpt_neox")
    x = torch.randn(1, 5, 48)

    def get_q(self: Any, x: Tensor) -> Tensor:
        w, b = self.query_key_value.weight.chunk(3)[0], self.query_key_value.bias.chunk(3)[0]
        return F.linear(x, w, b).view(1, 5, 3, 16).transpose(1, 2)

    report = tt.trace(get_q.__get__(neox), x)
    assert str(report.truth) == "h (q|k|v) d" and not report.conflicts
    assert [text.replace(f"{report.tensors[-1].line}", "N") for text in report.misread] == ["returned (line N) is q of (q|k|v) h d"]
    assert "No conflicts" not in str(report) and "modeling_gpt_neox.py" in str(report)
    found = run_fix(report.misread_fix, self=neox)
    right = tt.split(neox.query_key_value(x), "h (q|k|v) d", h=3)[0]
    assert torch.allclose(F.linear(x, found["w"], found["b"]).view(1, 5, 3, 16), right, atol=1e-6)
    assert report.to_dict()["misread_fix"] == report.misread_fix


def test_names_inside_library_code_are_not_used_in_the_lines() -> None:
    """GPT-2's Conv1D has an `x` of its own with all rows; the user's `x` is something else."""
    gpt2 = attention_of("gpt2")
    x = torch.randn(1, 5, 48)

    def read(self: Any, x: Tensor) -> Any:
        q, k, v = self.c_attn(x).view(1, 5, 3, 48).split(16, dim=-1)
        return q + k + v

    report = tt.trace(read.__get__(gpt2), x)
    assert str(report.truth) == "(q|k|v) h d" and len(report.misread) == 1
    assert report.misread_fix.startswith("# qkv: what self.c_attn returned\nq, k, v = qkv.")
    found = run_fix(report.misread_fix, qkv=gpt2.c_attn(x))
    for mine, right in zip((found["q"], found["k"], found["v"]), tt.split(gpt2.c_attn(x), "(q|k|v) h d", h=3), strict=True):
        assert torch.equal(mine, right)


def test_batch_last_says_where_the_axes_are() -> None:
    linear = nn.Linear(E, 3 * E)

    def run(x: Tensor) -> None:
        rows_first = linear(x).permute(2, 1, 0)
        q = rows_first.reshape(H, 3, D, S, B)[:, 0]
        q2 = rows_first.reshape(3, H, D, S, B)[0]
        assert q.shape == q2.shape

    (conflict,) = tt.trace(run, torch.randn(B, S, E)).conflicts
    assert "yours were axes 0 and 1" in conflict.fix_a and "yours were axes 0 and 1" in conflict.fix_b


def test_a_tensor_alone_has_no_return_value() -> None:
    weight = torch.randn(3 * E, E)

    def run(x: Tensor) -> None:
        q = (x @ weight.T).view(B, S, H, 3 * D)[..., :D]
        q2 = (x @ weight[:E].T).view(B, S, H, D)
        assert q.shape == q2.shape

    (conflict,) = tt.trace(run, torch.randn(B, S, E)).conflicts
    assert "# qkv: the product with weight" in conflict.fix_a
    found = run_fix(conflict.fix_a, qkv=torch.arange(3.0 * E).expand(B, S, -1))
    assert found["q"][0, 0].flatten().tolist() == list(range(E))


def test_an_exception_is_told_whole() -> None:
    linear = nn.Linear(E, 3 * E)

    def run(x: Tensor) -> Any:
        return linear(x).view(B, S, H, D)

    report = tt.trace(run, torch.randn(B, S, E))
    assert "is invalid for input\nof size 960" in str(report) and max(map(len, str(report).splitlines())) <= 80


def test_lines_of_a_conflict_stand_below_each_other() -> None:
    linear = nn.Linear(E, 3 * E)
    source = "\n" * 7 + "def run(x):\n    q = linear(x).view(2, 5, 4, 24)[..., :8]\n\n\n    q2 = linear(x)[..., :32].view(2, 5, 4, 8)\n"
    scope: dict[str, Any] = {"linear": linear}
    exec(compile(source, "mine.py", "exec"), scope)
    lines = str(tt.trace(scope["run"], torch.randn(B, S, E))).splitlines()
    first, second = (next(line for line in lines if line.startswith(f"  {name}") and "line" in line) for name in ("q ", "q2"))
    assert first.index("h (q|k|v) d") == second.index("(q|k|v) h d")
