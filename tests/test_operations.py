"""The one table of operations against torch's own schemas, and the engine of `probe` against the oracle of `trace`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.live.follow import Follow, Still
from triptych.live.labels import row
from triptych.live.ledger import Ledger
from triptych.live.operations import FACTORS, MOVES, effect_of, operation
from triptych.live.watch import Watch

from . import test_shadow
from .test_shadow import IN, NUMBERS, ROWS, B, Code, D, H, S, numbering_weight, one_hot


def schemas(name: str) -> list[set[str]]:
    """The argument names of every overload, in place or not."""
    packets = [getattr(torch.ops.aten, spelled) for spelled in (name, f"{name}_") if hasattr(torch.ops.aten, spelled)]
    return [{a.name for a in getattr(packet, one)._schema.arguments} for packet in packets for one in packet.overloads()]


@pytest.mark.parametrize("name", [*MOVES, *FACTORS])
def test_the_table_names_arguments_of_torch(name: str) -> None:
    found = schemas(name)
    assert found, "torch has no such operation"
    told = set(MOVES[name] if name in MOVES else filter(None, FACTORS[name]))
    assert told <= set().union(*found) and any(min(told & arguments, default="") for arguments in found)


def test_effects_come_from_the_schema() -> None:
    aten = torch.ops.aten
    found = {func: (operation(func).name, operation(func).effect) for func in (aten.add_.Tensor, aten.zero_.default, aten.cat.out)}
    assert found == {aten.add_.Tensor: ("add", "pointwise"), aten.zero_.default: ("zero", "erases"), aten.cat.out: ("cat", "moves")}
    assert operation(aten.cat.out).written == ("out",)
    assert {effect_of(name) for name in ("empty_like", "new_full", "normal")} == {"erases"}


def rows_of(code: Callable[[Tensor], Tensor], weight: Tensor, *more: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the code computes of one token's worth of ones, and the rows that `probe`'s engine sees in it."""
    ledger = Ledger({weight.untyped_storage()._cdata: 0})
    with torch.no_grad(), Watch(Follow(ledger)):
        out = code(one_hot())
    labels = ledger.labels(out)
    return out, None if labels is None else torch.div(row(labels), IN, rounding_mode="floor")


@pytest.mark.parametrize("name", test_shadow.MOVES)
def test_every_move_agrees_with_the_oracle(name: str) -> None:
    weight = numbering_weight()
    out, rows = rows_of(lambda x: test_shadow.MOVES[name](F.linear(x, weight)), weight)
    assert rows is not None and torch.equal(rows.to(out.dtype), out)


SUMMED = {"by hand"}
"""Here a sum written out: to `probe` it has no row."""


@pytest.mark.parametrize("name", [name for name in test_shadow.LINEAR if name not in SUMMED])
def test_every_linear_map_agrees_with_the_oracle(name: str) -> None:
    weight, none = numbering_weight(), torch.zeros(ROWS, dtype=torch.float64)
    out, rows = rows_of(lambda x: test_shadow.LINEAR[name](x, weight, none), weight)
    assert rows is not None and torch.equal(rows.to(out.dtype), out)


COMPLEX: dict[str, Code] = {
    "cat": lambda z: torch.cat([z[..., 5:], z[..., :5]], -1),
    "where": lambda z: torch.where(torch.arange(z.size(-1)) % 2 == 0, z, z.flip(-1)),
    "index": lambda z: z[..., [3, 1, 4]],
    "roll": lambda z: z.roll(4, -1),
    "pad": lambda z: F.pad(z, (2, 1))[..., 2:],
    "setitem": lambda z: z.clone().index_copy_(-1, torch.tensor([1, 0]), z[..., 8:10]),
    "conj": lambda z: z.conj().resolve_conj().conj().resolve_conj(),
    "made of two": lambda z: torch.complex(z.imag, z.real),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_carry_two_rows(name: str) -> None:
    weight = numbering_weight()
    out, rows = rows_of(lambda x: COMPLEX[name](torch.view_as_complex(F.linear(x, weight).view(B, S, ROWS // 2, 2))), weight)
    assert rows is not None
    parts = torch.view_as_real(out)
    kept = rows.flatten(-2) >= 0
    assert torch.equal(rows.to(parts.dtype).flatten(-2)[kept], parts.flatten(-2)[kept]) and kept.float().mean() > 0.9


def test_image_patches_are_moves_to_both_engines() -> None:
    def code(y: Tensor) -> Tensor:
        return F.unfold(y.view(B, S, 3 * H, D), 2)

    test_shadow.agrees(code)
    weight = numbering_weight()
    out, rows = rows_of(lambda x: code(F.linear(x, weight)), weight)
    assert rows is not None and torch.equal(rows.to(out.dtype), out)


def test_still_has_no_angle() -> None:
    with Still():
        angle = NUMBERS.clone()
        assert not angle.sin().any() and (angle.cos() == 1).all()
        assert torch.equal(angle.tan(), NUMBERS.tan())
    assert NUMBERS.sin().any()
