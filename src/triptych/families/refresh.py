"""Writes data/config_defaults.json from the installed transformers: `python -m triptych.families.refresh`.

For every model type of the table: defaults of the keys that its formulae name, other spellings of them, and the model types of sub-configs.
Only what stands in the class counts; values that a class computes from others are left to the formulae.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from .formula import keys
from .records import DATA, Record, all_records

PATH = DATA / "config_defaults.json"


def defaults() -> dict[str, Any]:
    """The content of the file."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    wanted: dict[str, set[str]] = {}
    for record in all_records():
        for name in record.types:
            wanted.setdefault(name, set()).update(_keys(record))
    classes = {name: CONFIG_MAPPING[name] for name in dict.fromkeys(CONFIG_MAPPING.keys())}
    for cls in list(classes.values()):
        _add_towers(cls, classes)
    types = {name: entry for name, cls in sorted(classes.items()) if (entry := _entry(cls, wanted.get(name, set()), classes))}
    return {"package": f"transformers=={transformers.__version__}", "types": types}


def _add_towers(cls: Any, classes: dict[str, Any]) -> None:
    """Sub-config classes that the library does not register, such as those of bark."""
    for sub in (getattr(cls, "sub_configs", None) or {}).values():
        kind = getattr(sub, "model_type", "")
        if kind and kind not in classes:
            classes[kind] = sub
            _add_towers(sub, classes)


def _entry(cls: Any, wanted: set[str], classes: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    fields = _class_values(cls)
    aliases = getattr(cls, "attribute_map", {}) or {}
    for key in sorted(wanted):
        if key in aliases:
            entry.setdefault("aliases", {})[key] = [aliases[key]]
        value = _partial_rotary(cls) if key == "partial_rotary_factor" else _dig(fields, aliases.get(key, key))
        if isinstance(value, bool | int | float | str | list | tuple) and value != "":
            entry.setdefault("defaults", {})[key] = list(value) if isinstance(value, tuple) else value
    made = _made(cls) if getattr(cls, "sub_configs", None) else None
    towers = {
        key: getattr(getattr(made, key, None), "model_type", "") or getattr(sub, "model_type", "") for key, sub in cls.sub_configs.items()
    }
    if towers := {key: kind for key, kind in towers.items() if kind in classes}:
        entry["towers"] = towers
    return entry


def _made(cls: Any) -> Any:
    """An instance with all defaults, or None for the few classes that have none."""
    try:
        return cls()
    except Exception:
        return None


def _partial_rotary(cls: Any) -> Any:
    """The share of rotated dims that a class fills in when it is made, not in its fields."""
    rope = getattr(_made(cls), "rope_parameters", None) or {}
    value = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    return value if value != 1 else None


def _keys(record: Record) -> set[str]:
    texts = [text for entry in record.entries for text in (entry.when, entry.rotary, *(text for _, text in entry.sizes)) if text]
    texts += [entry.rope for entry in record.entries if entry.rope and " if " in entry.rope]
    return {key for text in texts for key in keys(text)}


def _class_values(cls: type) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


def _dig(values: dict[str, Any], dotted: str) -> Any:
    value: Any = values
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def main() -> None:
    content = defaults()
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in content["types"].items())
    PATH.write_text(f'{{"package": {json.dumps(content["package"])}, "types": {{\n{lines}\n}}}}\n', "utf-8")


if __name__ == "__main__":
    main()
