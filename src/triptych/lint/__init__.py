"""What is wrong with a checkpoint: rules, each a small function with a page in docs/lint."""

from .engine import RULES, lint
from .report import Report

__all__ = ["RULES", "Report", "lint"]
