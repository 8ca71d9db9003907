"""The public names: all load, all are documented, none is missing."""

from __future__ import annotations

import importlib

import pytest

import triptych as tt
from triptych import _HOME


def test_all_is_what_is_there() -> None:
    assert sorted(tt.__all__) == sorted(name for names in _HOME.values() for name in names)


@pytest.mark.parametrize("name", tt.__all__)
def test_every_name_loads_and_is_documented(name: str) -> None:
    assert (getattr(tt, name).__doc__ or "").strip()


def test_functions_win_over_modules_of_the_same_name() -> None:
    for module in ("triptych.plan", "triptych.verify"):
        importlib.import_module(module)
    assert callable(tt.plan) and callable(tt.verify)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tt.nonsense
