"""Families: which model names, lays out and sizes its fused projections how. Data with provenance; `records.py` has the format."""

from .declare import LOOKS_FUSED, Declaration, Projection, declared
from .listing import families, show
from .records import Entry, Record, all_records, find, load_records, lookup

__all__ = [
    "LOOKS_FUSED",
    "Declaration",
    "Entry",
    "Projection",
    "Record",
    "all_records",
    "declared",
    "families",
    "find",
    "load_records",
    "lookup",
    "show",
]
