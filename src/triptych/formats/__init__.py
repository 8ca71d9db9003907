"""Checkpoint files: names, dtypes and byte ranges of tensors. Never a layout."""

from .folder import MARKER, Other, Stored, index_bytes, read, read_config, read_json
from .gguf import nbytes
from .safetensors import ALIGN, BITS, METADATA, Header, Tensor, header_bytes, open_file, parse_json, read_header, without_gc
from .torch_zip import safetensors_name, settings

__all__ = [
    "ALIGN",
    "BITS",
    "MARKER",
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
    "safetensors_name",
    "settings",
    "without_gc",
]
