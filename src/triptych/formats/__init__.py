"""Checkpoint files: names, dtypes and byte ranges of tensors. Never a layout."""

from .folder import Other, Stored, index_bytes, read, read_config, read_json
from .safetensors import ALIGN, BITS, METADATA, Header, Tensor, header_bytes, nbytes, open_file, parse_json, read_header, without_gc

__all__ = [
    "ALIGN",
    "BITS",
    "METADATA",
    "Header",
    "Other",
    "Stored",
    "Tensor",
    "header_bytes",
    "index_bytes",
    "nbytes",
    "open_file",
    "parse_json",
    "read",
    "read_config",
    "read_header",
    "read_json",
    "without_gc",
]
