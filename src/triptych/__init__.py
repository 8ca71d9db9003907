"""Layouts of fused attention projections: say them, split them, explain them, convert them, prove it.

>>> import triptych as tt
>>> print(tt.Layout("h (q|k|v) d").size(h=4, d=32))
384
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import inspect
    from .detect import Verdict, detect
    from .detect_files import detect_checkpoint
    from .errors import (
        FormatError,
        IncompatibleError,
        LayoutError,
        LayoutSyntaxError,
        MismatchError,
        MissingExtraError,
        PlanError,
        SizeError,
        TraceError,
        TriptychError,
    )
    from .layout import Layout, Row
    from .live.diagnose import assert_same_rows, diagnose
    from .live.probe import Probed, probe
    from .live.trace import trace
    from .picture import explain
    from .plan import plan
    from .rowmap import RowMap, from_indices
    from .run import convert
    from .sizes import Sizes, bind
    from .tensors import fuse, move, repack, split
    from .verify import verify

__version__ = "0.1.0"

_HOME = {
    "errors": (
        "FormatError",
        "IncompatibleError",
        "LayoutError",
        "LayoutSyntaxError",
        "MismatchError",
        "MissingExtraError",
        "OutputError",
        "PlanError",
        "SizeError",
        "TraceError",
        "TriptychError",
    ),
    "layout": ("Layout", "Row"),
    "sizes": ("Sizes", "bind"),
    "rowmap": ("RowMap", "from_indices"),
    "tensors": ("fuse", "move", "repack", "split"),
    "picture": ("explain",),
    "checkpoint": ("inspect",),
    "detect": ("Verdict", "detect"),
    "detect_files": ("detect_checkpoint",),
    "plan": ("plan",),
    "run": ("convert",),
    "verify": ("verify",),
    "live.trace": ("trace",),
    "live.probe": ("Probed", "probe"),
    "live.diagnose": ("assert_same_rows", "diagnose"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "FormatError",
    "IncompatibleError",
    "Layout",
    "LayoutError",
    "LayoutSyntaxError",
    "MismatchError",
    "MissingExtraError",
    "OutputError",
    "PlanError",
    "Probed",
    "Row",
    "RowMap",
    "SizeError",
    "Sizes",
    "TraceError",
    "TriptychError",
    "Verdict",
    "assert_same_rows",
    "bind",
    "convert",
    "detect",
    "detect_checkpoint",
    "diagnose",
    "explain",
    "from_indices",
    "fuse",
    "inspect",
    "move",
    "plan",
    "probe",
    "repack",
    "split",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Public names load their module on first use: `import triptych` itself imports nothing but this file."""
    if name not in _MODULE:
        raise AttributeError(f"module 'triptych' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(types.ModuleType):
    """`tt.plan` and `tt.verify` stay the functions when the modules of the same name are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, types.ModuleType) and name in _MODULE:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
