"""Families: which model names, lays out and sizes its fused projections how. Data with provenance; `records.py` has the format."""

from .declare import LOOKS_FUSED, Declaration, Projection, declared, wrapped
from .listing import families, namesakes, show
from .records import Entry, Record, all_records, find, load_records, lookup
from .sized import CONTRADICTED
from .switches import Setting, settings

__all__ = [
    "CONTRADICTED",
    "LOOKS_FUSED",
    "Declaration",
    "Entry",
    "Projection",
    "Record",
    "Setting",
    "all_records",
    "declared",
    "families",
    "find",
    "load_records",
    "lookup",
    "namesakes",
    "settings",
    "show",
    "wrapped",
]
