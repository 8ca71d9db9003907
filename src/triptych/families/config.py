"""A config as formulae see it: dotted keys, other spellings, defaults of the config class, and the numbers in the tensor's name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..errors import FormatError
from .formula import Missing
from .records import DATA

MAX_DEPTH = 8


@dataclass(frozen=True)
class View:
    """The (sub-)config that a record's formulae read.

    `type` is its model type, `path` where it lies in the whole config (`text_config`), `defaults` what the record adds.
    """

    config: Mapping[str, Any] = field(hash=False)
    type: str
    path: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def get(self, name: str) -> object:
        """The value of a dotted key, or a `Missing`; a null that the config says is no default's to fill.

        Raises FormatError when the path leads through something that is no table.
        """
        known = class_defaults().get(self.type, {})
        values = [_walk(self.config, key) for key in (name, *known.get("aliases", {}).get(name, ()))]
        said = [value for value in values if not isinstance(value, Missing)]
        if said:
            return next((value for value in said if value is not None), None)
        for table in (self.defaults, known.get("defaults", {})):
            if table.get(name) is not None:
                return table[name]
        return _walk(self.config, name)

    def layer(self, name: str, number: int) -> object:
        """The value of a key in one layer: from `per_layer_config` if it has it, else as for all layers."""
        table = self.get("per_layer_config")
        if isinstance(table, Mapping):
            for key, values in table.items():
                if str(key).isdecimal() and int(key) == number and isinstance(values, Mapping) and values.get(name) is not None:
                    return values[name]
        return self.get(name)


def _walk(table: Mapping[str, Any], dotted: str) -> object:
    value: object = table
    for key in dotted.split("."):
        if value is None:
            return Missing(dotted)
        if not isinstance(value, Mapping):
            raise FormatError("the config has a value where a table is needed", found=f"{value!r}"[:60], expected=dotted)
        if key not in value:
            return Missing(dotted)
        value = value[key]
    return value


@lru_cache(maxsize=1)
def class_defaults() -> dict[str, dict[str, Any]]:
    """Model type -> defaults, other spellings of keys (aliases) and sub-configs (key -> model type) of transformers' configuration classes.

    A config.json may leave out what equals the default of its class, sub-configs most of all.
    """
    types: dict[str, dict[str, Any]] = json.loads((DATA / "config_defaults.json").read_text("utf-8"))["types"]
    return types


def towers(config: Mapping[str, Any]) -> Iterator[View]:
    """The config itself and every sub-config of a known model type, outermost first.

    The model type of a sub-config that names none, or is left out, is that of its configuration class; a text model whose
    `text_config` is left out has its keys at the top, as older files do.
    """
    yield from _towers(config, "", (), 0)


def _towers(config: Mapping[str, Any], kind: str, path: tuple[str, ...], depth: int) -> Iterator[View]:
    named = config.get("model_type")
    kind = named if isinstance(named, str) and named else kind
    if kind:
        yield View(config, kind, path)
    inner: dict[str, str] = class_defaults().get(kind, {}).get("towers", {})
    if depth == MAX_DEPTH:
        return
    for key in dict.fromkeys([*inner, *config]):
        value = config.get(key)
        if isinstance(value, Mapping) and isinstance(key, str):
            yield from _towers(value, inner.get(key, ""), (*path, key), depth + 1)
        elif key in inner and value is None:
            if key == "text_config":
                yield View(config, inner[key], (*path, key))
            else:
                yield from _towers({}, inner[key], (*path, key), depth + 1)
