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
    from .blocks import blocks
    from .certificate import certify, check_certificate
    from .checkpoint import inspect
    from .detect import Verdict, detect
    from .detect_files import detect_checkpoint
    from .diff import Diff, diff
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
    from .lint import lint
    from .live.attention import FusedAttention, attend
    from .live.capture import capture
    from .live.diagnose import assert_same_rows, diagnose
    from .live.heads import heads
    from .live.kv_cache import KVCache
    from .live.modules import Surgery, fuse_, state_dict, undo, unfuse_
    from .live.probe import Probed, probe
    from .live.project import project
    from .live.prune import prune_heads_
    from .live.trace import trace
    from .picture import explain
    from .plan import plan
    from .rowmap import RowMap, from_indices
    from .run import convert
    from .shard import merge, shard
    from .shard_plan import merge_plan, shard_plan
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
    "blocks": ("blocks",),
    "tensors": ("fuse", "move", "repack", "split"),
    "picture": ("explain",),
    "checkpoint": ("inspect",),
    "detect": ("Verdict", "detect"),
    "detect_files": ("detect_checkpoint",),
    "plan": ("plan",),
    "lint": ("lint",),
    "run": ("convert",),
    "shard_plan": ("merge_plan", "shard_plan"),
    "shard": ("merge", "shard"),
    "verify": ("verify",),
    "certificate": ("certify", "check_certificate"),
    "diff": ("Diff", "diff"),
    "live.attention": ("FusedAttention", "attend"),
    "live.kv_cache": ("KVCache",),
    "live.project": ("project",),
    "live.trace": ("trace",),
    "live.probe": ("Probed", "probe"),
    "live.modules": ("Surgery", "fuse_", "state_dict", "undo", "unfuse_"),
    "live.diagnose": ("assert_same_rows", "diagnose"),
    "live.capture": ("capture",),
    "live.heads": ("heads",),
    "live.prune": ("prune_heads_",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Diff",
    "FormatError",
    "FusedAttention",
    "IncompatibleError",
    "KVCache",
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
    "Surgery",
    "TraceError",
    "TriptychError",
    "Verdict",
    "assert_same_rows",
    "attend",
    "bind",
    "blocks",
    "capture",
    "certify",
    "check_certificate",
    "convert",
    "detect",
    "detect_checkpoint",
    "diagnose",
    "diff",
    "explain",
    "from_indices",
    "fuse",
    "fuse_",
    "heads",
    "inspect",
    "lint",
    "merge",
    "merge_plan",
    "move",
    "plan",
    "probe",
    "project",
    "prune_heads_",
    "repack",
    "shard",
    "shard_plan",
    "split",
    "state_dict",
    "trace",
    "undo",
    "unfuse_",
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
            if _MODULE[name] != name:  # a module that happens to have the name: `from .heads import ...` finds it without
                return
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
