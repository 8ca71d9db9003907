"""Turned matrices: the bytes of NumPy's own transpose, for tiles and strips of every shape."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from triptych import turns
from triptych.layout import Layout
from triptych.mover import Mover
from triptych.relay import in_turned_nests, relay
from triptych.sizes import bind
from triptych.steps import Feed, Nest, Step

CASES = (
    ("(q|k|v) h d", "h (q|k|v) d"),
    ("h (q|k|v) d", "(q|k|v) h d"),
    ("h (q|k|v) d", "h (q|k|v) d"),
    ("h (q|k|v) d", "d h (q|k|v)"),
    ("g (q r|k|v) d", "(q g r|k g|v g) d"),
)
SIZES = {"h": 6, "g": 3, "r": 2, "d": 5}
LIMITS = ((5 << 20, 2 << 20, 15_000), (4096, 2048, 15_000), (900, 400, 40), (300, 200, 0))
"""Bytes of a tile, of a strip, and the bytes that a call is worth."""


def rows_of(text: str) -> list[str]:
    layout = Layout(text)
    return [str(row) for row in layout.rows(**{axis: SIZES[axis] for axis in layout.axes})]


def moved(step: Step, source: bytes, folder: Path) -> bytes:
    (folder / "in").write_bytes(bytes(7) + source)
    fds = os.open(folder / "in", os.O_RDONLY), os.open(folder / "out", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    done: list[int] = []
    try:
        Mover().move(step, [fds[0]] * len(step.feeds), fds[1], 3, done.append)
    finally:
        for fd in fds:
            os.close(fd)
    assert sum(done) == step.size
    return (folder / "out").read_bytes()[3:]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("before", "after"), CASES)
def test_rows_are_turned_and_put_in_order(
    before: str, after: str, axis: int, limits: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("TILE", "STRIP", "CALL"), limits, strict=True):
        monkeypatch.setattr(turns, name, value)
    turns.tile_of.cache_clear()
    one, two = Layout(before), Layout(after)
    used = {axis: SIZES[axis] for axis in {*one.axes, *two.axes}}
    way = relay((one,), (two,), bind(one, two, **used))
    (cut,) = way.cuts
    order = [rows_of(before).index(row) for row in rows_of(after)]
    for wide, item in ((7, 2), (64, 1), (33, 4), (130, 8)):
        rows = cut.rows
        matrix = np.random.default_rng(wide).integers(0, 256, (rows, wide * item), np.uint8).view(f"u{item}")
        nests = in_turned_nests(cut.blocks[0][1], wide, item, rows, rows, axis)
        assert turns.turn((nests,), (matrix.nbytes,), matrix.nbytes) is not None
        source, want = (matrix.T, matrix[order]) if axis == 0 else (matrix, matrix[order].T)
        step = Step("w", "U8", want.shape, 0, matrix.nbytes, (Feed("in", "w", 7, matrix.nbytes, nests),))
        assert moved(step, np.ascontiguousarray(source).tobytes(), tmp_path) == np.ascontiguousarray(want).tobytes()


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_and_zeros(axis: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three parts from one source, the third of the output zero; and what nests do not speak of is not read."""
    wide, item, rows = 40, 2, 90
    matrix = np.random.default_rng(0).integers(0, 1 << 16, (rows, wide), np.uint16)
    way = relay((Layout("h (q|k|v) d"),), (Layout("(q h d)"), Layout("(v h d)"), Layout("(k h d)")), bind(Layout("h (q|k|v) d"), h=6, d=5))
    for number, part in ((0, 0), (1, 2)):
        nests = in_turned_nests(way.cuts[number].blocks[0][1], wide, item, 60, rows, axis)
        feed = Feed("in", "w", 7, matrix.nbytes, nests)
        step = Step("w", "U16", (60, wide), 0, 60 * wide * item, (feed,), (Nest(0, 0, 1),))
        want = np.concatenate([matrix.reshape(6, 3, 5, wide)[:, part].reshape(30, wide), np.zeros((30, wide), np.uint16)])
        source, want = (matrix.T, want) if axis == 0 else (matrix, want.T)
        for tile in (5 << 20, 500):
            monkeypatch.setattr(turns, "TILE", tile)
            turns.tile_of.cache_clear()
            assert moved(step, np.ascontiguousarray(source).tobytes(), tmp_path) == np.ascontiguousarray(want).tobytes()


def test_a_matrix_that_is_not_turned_is_none() -> None:
    assert turns.turn(((Nest(0, 6, 6, ((4, 6, 12),)),),), (96,), 24) is None
    assert turns.turn((), (), 0) is None


def test_tiles_of_large_matrices_are_near_square_and_fit() -> None:
    for lines, length in ((2048, 6144), (28672, 8192), (2, 4_000_000), (4_000_000, 2), (50_000, 50_000)):
        rows, items = turns.tile_of(turns.Turn(2, lines, length, 0, (2 * lines,), (((0, 0, lines),),)))
        assert 0 < rows * items * 2 <= turns.TILE and rows <= lines and items <= length and rows * 2 < turns.STRIP
    assert min(turns.tile_of(turns.Turn(2, 28672, 8192, 0, (57344,), (((0, 0, 28672),),)))) > 1000
