"""`project` computes the rows of some parts: the right ones, from the weight as it is now."""

from __future__ import annotations

import gc
import importlib.util
import re
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import triptych as tt
from triptych.live import project as module
from triptych.live.project import forget, project

from .strategies import ALL, sizes_for

NEOX, GPT2 = "h (q|k|v) d", "(q|k|v) h d"


def whole(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Small whole numbers: products and sums are exact in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def linear(rows: int, width: int = 6, turned: bool = False) -> nn.Module:
    made = Conv1D(rows, width) if turned else nn.Linear(width, rows)
    made.double()
    with torch.no_grad():
        made.weight.copy_(whole(tuple(made.weight.shape), 1))
        made.bias.copy_(whole((rows,), 2))
    return made


@pytest.mark.parametrize("turned", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("text", ALL)
def test_every_part_of_every_layout_equals_the_split(text: str, turned: bool) -> None:
    layout = tt.Layout(text)
    sizes = sizes_for(layout, t=2, n=1, r=3, p=2)
    fused = linear(layout.size(**sizes), turned=turned)
    x = whole((2, 3, 6), 3)
    parts = tt.split(fused(x), layout, **sizes)
    with torch.no_grad():
        for name in layout.parts:
            assert torch.equal(project(fused, x, name, layout, **sizes), parts[name])
            assert torch.equal(project(fused, x[0, 0], name, text, **sizes), parts[name][0, 0])
        names = layout.parts[:2]
        assert all(torch.equal(ours, parts[name]) for ours, name in zip(project(fused, x, names, layout, **sizes), names, strict=True))
    grown = project(fused, x, layout.parts[0], layout, **sizes)
    assert torch.equal(grown, parts[layout.parts[0]]) and grown.requires_grad


def test_a_part_in_pieces_is_joined_in_row_order() -> None:
    fused, x = linear(2 * 3 * 7), whole((5, 6), 3)
    sizes = {"h": 2, "p": 2, "u": 3}
    for text, order in (("h (q|k|v) (rot c p|pass u)", ("rot", "pass")), ("(k|q|v) h (pass u|rot p c)", ("pass", "rot"))):
        parts = tt.split(fused(x), text, **sizes)
        joined = torch.cat([parts[f"q.{piece}"] for piece in order], -1)
        assert torch.equal(project(fused, x, "q", text, **sizes), joined)


def rows_of(fused: nn.Module) -> torch.Tensor:
    (kept,) = module._PREPARED[fused].values()
    return kept.tensors(fused.weight, fused.bias)[0]


def test_rows_in_one_run_are_a_view_and_others_are_copied_once() -> None:
    x = whole((1, 6), 3)
    with torch.no_grad():
        fused = linear(24)
        project(fused, x, "q", GPT2, h=2)
        assert rows_of(fused).data_ptr() == fused.weight.data_ptr()
        fused = linear(24)
        project(fused, x, "k", GPT2, h=2)
        assert rows_of(fused).data_ptr() == fused.weight[8:].data_ptr()
        fused = linear(24)
        project(fused, x, "q", NEOX, h=2)
        first = rows_of(fused)
        project(fused, x, "q", NEOX, h=2)
        assert rows_of(fused) is first and first.is_contiguous()


def changed_in_place(fused: nn.Module) -> None:
    with torch.no_grad():
        fused.weight[0].mul_(2)


def changed_bias(fused: nn.Module) -> None:
    with torch.no_grad():
        fused.bias.add_(1)


def without_bias(fused: nn.Module) -> None:
    fused.bias = None


def new_parameter(fused: nn.Module) -> None:
    fused.weight = nn.Parameter(fused.weight.detach() * 3)


def stepped(fused: nn.Module) -> None:
    fused(whole((2, 6), 5)).sum().backward()
    torch.optim.SGD(fused.parameters(), lr=1).step()


def loaded(fused: nn.Module) -> None:
    fused.load_state_dict({name: tensor * 5 for name, tensor in fused.state_dict().items()})


def loaded_by_assignment(fused: nn.Module) -> None:
    fused.load_state_dict({name: tensor * 5 for name, tensor in fused.state_dict().items()}, assign=True)


def swapped_data(fused: nn.Module) -> None:
    for factor in range(2, 40):  # freed memory is taken again, at the same address
        fused.weight.data = fused.weight.data * factor / (factor - 1)


def as_float_and_back(fused: nn.Module) -> None:
    fused.float()
    with torch.no_grad():
        project(fused, whole((1, 6), 3).float(), "q", NEOX, h=2)
        fused.weight.mul_(2)
    fused.double()


def in_inference_mode(fused: nn.Module) -> None:
    with torch.inference_mode():
        fused.weight = nn.Parameter(fused.weight * 2, requires_grad=False)
        project(fused, whole((1, 6), 3), "q", NEOX, h=2)
        fused.weight.mul_(3)


CHANGES = [changed_in_place, changed_bias, new_parameter, stepped, loaded, loaded_by_assignment, swapped_data]
CHANGES += [as_float_and_back, in_inference_mode]


@pytest.mark.parametrize(
    ("change", "turned"), [*((change, turned) for change in CHANGES for turned in (False, True)), (without_bias, False)]
)
def test_a_changed_weight_is_seen(change: object, turned: bool) -> None:
    fused, x = linear(24, turned=turned), whole((3, 6), 3)
    with torch.no_grad():
        before = project(fused, x, "q", NEOX, h=2)
    change(fused)
    with torch.no_grad():
        after = project(fused, x, "q", NEOX, h=2)
        assert torch.equal(after, tt.split(fused(x), NEOX, h=2).q)
    assert not torch.equal(before, after)


def test_writes_through_data_are_seen_after_forget() -> None:
    fused, x = linear(24), whole((3, 6), 3)
    with torch.no_grad():
        project(fused, x, "q", NEOX, h=2)
        fused.weight.data.mul_(2)
        forget(fused)
        assert torch.equal(project(fused, x, "q", NEOX, h=2), tt.split(fused(x), NEOX, h=2).q)


def test_gradients_reach_only_the_rows_of_the_part() -> None:
    fused, x = linear(24), whole((3, 6), 3)
    project(fused, x, "q", NEOX, h=2).square().sum().backward()
    touched = fused.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [row.part == "q" for row in tt.Layout(NEOX).rows(h=2, d=4)]
    ours = fused.weight.grad.clone()
    fused.zero_grad()
    tt.split(fused(x), NEOX, h=2).q.square().sum().backward()
    assert torch.equal(ours, fused.weight.grad)


def test_what_is_kept_goes_with_the_module() -> None:
    fused = linear(24)
    with torch.no_grad():
        project(fused, whole((3, 6), 3), "q", NEOX, h=2)
    gone = weakref.ref(fused)
    del fused
    gc.collect()
    assert gone() is None


def test_the_layout_from_the_model_itself_or_from_an_entry() -> None:
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=31, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=3, rotary_pct=1.0
    )
    model = transformers.GPTNeoXModel(config).double().eval()
    fused, x = model.layers[1].attention.query_key_value, torch.randn(2, 4, 24, dtype=torch.float64)
    with torch.no_grad():
        q = fused(x).view(2, 4, 3, 24)[..., :8]  # as its own code reads it
        assert torch.allclose(project(fused, x, "q", model=model), q, rtol=0, atol=1e-14)
        entry = tt.probe(model)["layers.1.attention.query_key_value"]
        assert torch.allclose(project(fused, x, "q", entry), q, rtol=0, atol=1e-14)
    with pytest.raises(tt.LayoutError, match=r"not a fused projection\n  where    layers\.1\.attention\.dense"):
        project(model.layers[1].attention.dense, x, "q", model=model)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda x: project(linear(24), x, "q"), "the layout is not known\n  expected layout=, or model= to probe"),
        (lambda x: project(linear(24), x, "gate", NEOX, h=2), "has no part 'gate'\n  layout   h .q.k.v. d\n  expected q, k, v"),
        (lambda x: project(linear(25), x, "q", NEOX, h=2, d=4), "rows do not fill the layout"),
        (
            lambda x: project(linear(24), x[:, :5], "q", NEOX, h=2),
            "the input does not fit the projection\n  expected .*6.\n  found    .3, 5.",
        ),
        (lambda x: project(nn.ReLU(), x, "q", NEOX, h=2), "an nn.Linear or a transformers Conv1D\n  found    ReLU"),
        (lambda x: project(Scaled(6, 24), x, "q", NEOX, h=2), "found    Scaled"),
        (lambda x: project(linear(24), x, "q", model=nn.ReLU()), "the model does not hold this module"),
    ],
)
def test_errors(act: object, words: str) -> None:
    with pytest.raises(tt.LayoutError, match=words):
        act(whole((3, 6), 3))


def test_a_replaced_forward_is_refused() -> None:
    fused = linear(24)
    fused.forward = lambda x: x
    with pytest.raises(tt.LayoutError, match="whose forward is replaced"):
        project(fused, whole((3, 6), 3), "q", NEOX, h=2)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("example", Path(__file__).parent.parent / "examples" / "q_for_my_cache.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "query_key_value is   h (q|k|v) d  h=4 d=32"
    assert "9 tokens cached (2, 4, 9, 32)" in rest[-2]
    assert all(float(number) < 1e-12 for line in rest for number in re.findall(r"\de-\d+", line))


def test_what_is_no_question() -> None:
    """A weight for its module, no part, and a list of parts: prepared once, as a tuple is."""
    linear, x = nn.Linear(5, 24), torch.randn(2, 5)
    for what, part, message in ((linear.weight, "q", "rows are taken from a module"), (linear, (), "no part is asked for")):
        with pytest.raises(tt.LayoutError, match=message):
            project(what, x, part, "h (q|k|v) d", h=2)  # type: ignore[call-overload]
    listed = project(linear, x, ["k", "v"], "h (q|k|v) d", h=2)  # type: ignore[call-overload]
    again = project(linear, x, ("k", "v"), "h (q|k|v) d", h=2)
    assert isinstance(again, tuple) and all(map(torch.equal, listed, again)) and [one.shape for one in again] == [(2, 2, 4)] * 2
