"""Recurrences that stand for attention: functions of query, key and value whose inside need not be followed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from .ledger import Ledger
from .watch import quietly

NAMES = re.compile(r"delta_rule|delta_attention|kda|retention|selective_scan|chunk_scan|mlstm|chunkwise")

OTHERS = {"beta": "b", "g": "a", "igate": "i", "fgate": "f"}


@contextlib.contextmanager
def recurrences(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """While it lasts, such functions in the modules of the model's code tell the ledger what reached them."""
    changed: list[tuple[Any, str, Any]] = []
    try:
        for home in {sys.modules[type(module).__module__] for module in model.modules() if type(module).__module__ in sys.modules}:
            for name, value in list(vars(home).items()):
                if _is_recurrence(name, value):
                    changed.append((home, name, value))
                    setattr(home, name, _reporting(value, ledger))
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if _is_recurrence(name, value):
                    changed.append((module, name, value))
                    object.__setattr__(module, name, _reporting(value, ledger))
        yield
    finally:
        for owner, name, value in reversed(changed):
            object.__setattr__(owner, name, value) if isinstance(owner, nn.Module) else setattr(owner, name, value)


def _is_recurrence(name: str, value: object) -> bool:
    if isinstance(value, functools.partial):
        name, value = getattr(value.func, "__name__", ""), value.func
    if not inspect.isfunction(value) or not NAMES.search(name):
        return False
    return bool(_operands(value))


def _operands(function: Callable[..., Any]) -> list[str]:
    """The names of query, key and value, or of x, dt, B and C of a state space."""
    names = list(inspect.signature(function).parameters)
    for wanted in ((("query", "q"), ("key", "k"), ("value", "v")), (("hidden_states", "x"), ("dt",), ("B",), ("C",))):
        found = [next((n for n in names if n in options), "") for options in wanted]
        if all(found):
            return found
    return []


def _reporting(function: Callable[..., Any], ledger: Ledger) -> Callable[..., Any]:
    """The same function, which tells the ledger what reached it."""
    operands, signature = _operands(function), inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        """Runs it unseen, then notes its operands and its output."""
        bound = signature.bind(*args, **kwargs).arguments
        blind, ledger.blind = ledger.blind, True
        try:
            result = function(*args, **kwargs)
        finally:
            ledger.blind = blind
        out = result[0] if isinstance(result, tuple) else result
        if ledger.blind or not isinstance(out, Tensor):
            return result
        with quietly():
            if len(operands) == 4:
                z = {"z": bound["z"]} if isinstance(bound.get("z"), Tensor) else {}
                ledger.scan(out, dict(zip(("x", "dt", "B", "C"), (bound[name] for name in operands), strict=True)) | z)
            else:
                q, k, v = (bound[name] for name in operands)
                others = {part: bound[name] for name, part in OTHERS.items() if isinstance(bound.get(name), Tensor)}
                ledger.attention(q, k, v, out, False, heads=-3 if "igate" in bound else -2, **others)
        return result

    return wrapped
