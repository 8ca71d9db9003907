"""The smallest instance of a transformers config that keeps its ratios, and something to call it with."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import FormatError, MissingExtraError

Call = tuple[tuple[Any, ...], dict[str, Any]]
HEAD_DIM, TOKENS, VOCABULARY = 16, 6, 128

HEADS = re.compile(r"(^|_)(n_?)?heads?$")
WIDTHS = re.compile(
    r"^(hidden_size|d_model|n_embd|n_inner|embed_dims?|embedding_dim|hidden_dim|d_ff|d_kv|dim|width|head_dim|hidden_sizes|neck_hidden_sizes|mlp_dim)$"
    r"|(hidden_size|_hidden_dim|head_dim|_rank|intermediate_size|ffn_dim|ffn_hidden_size|_embed_dim|_head_width|_kv_channels|kv_channels|key_dim)$"
    r"|^(encoder|decoder)_ffn_dim$|^output_hidden_size$|^out_hidden_size$|^rotary_dim$|_d_head$|^d_head$|^mamba_d_ssm$|^d_kv$|^attention_head_size$|^index_head_dim$|^projection_dim$"
)
TIED = re.compile(r"^(mamba_d_ssm|hidden_size|d_model|n_embd|embed_dim|embedding_dim|dim|width|intermediate_size|moe_intermediate_size)$")
DEPTHS = re.compile(
    r"(^|_)(n_layers?|num_layers|num_hidden_layers|depth|encoder_layers|decoder_layers|num_blocks|num_block|num_encoder_layers|num_decoder_layers)$"
)
EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$")
CHOSEN = re.compile(r"^(num_experts_per_tok|moe_top_k|num_experts_per_token|top_k_experts|moe_topk|topk)$")
GROUPS = re.compile(r"^(n_group|topk_group)$")


def instances(config: Any, failed: list[str] | None = None, **overrides: Any) -> Iterator[nn.Module]:
    """Instances, the smallest first: all made small, then with heads kept, then widths, then images: at last the layers alone are cut.

    On the CPU, float32, weights as initialised.
    Args: config: a transformers config, the name of a model type, or the content of a config.json.
        failed: is told what cannot be built. overrides: keys set as given.
    """
    config = _config(config)
    failed = [] if failed is None else failed
    for small in variants(config, **overrides):
        for cls in classes(config):
            state = torch.random.get_rng_state()
            try:
                torch.manual_seed(0)
                model = cls(copy.deepcopy(small)) if not hasattr(cls, "_from_config") else cls._from_config(copy.deepcopy(small))
                yield model.float().eval()
                break
            except Exception as error:  # whatever the model's own code raises
                failed.append(f"{cls.__name__}: {type(error).__name__}: {error}")
            finally:
                torch.random.set_rng_state(state)


def _config(config: Any) -> Any:
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError:
        raise MissingExtraError("transformers", "hf") from None
    if isinstance(config, str):
        return AutoConfig.for_model(config)
    if not isinstance(config, Mapping):
        return config
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise FormatError(
            "no model of transformers has this config", found=f"model_type {kind!r}", try_="give the instance itself: tt.probe(model)"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(config))
    except Exception as error:  # the config class checks its values with exceptions of any kind
        raise FormatError("transformers refuses this config", found=f"{type(error).__name__}: {error}"[:300]) from None


def variants(config: Any, **overrides: Any) -> Iterator[Any]:
    """Smaller copies of a config, each once."""
    seen = []
    for heads, widths, images in ((1, 1, 1), (1, 1, 0), (0, 1, 1), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        small = copy.deepcopy(config)
        for name, value in overrides.items():
            setattr(small, name, value)
        _shrink(small, bool(heads), bool(widths), bool(images), frozenset(overrides))
        if str(small.to_dict()) not in seen:
            seen.append(str(small.to_dict()))
            yield small


def _shrink(config: Any, heads: bool, widths: bool, images: bool, kept: frozenset[str], above: tuple[int, int] = (1, 1)) -> None:
    """In place. `above`: by what the config around this one divided widths and heads, for one that has no heads of its own."""
    own = any(HEADS.search(name) or name.endswith("head_dim") for name, _ in _items(config))
    scale = (_scale(config) if own else above[0]) if widths else 1
    fewer = (_fewer(config) if own else above[1]) if heads and not kept else 1
    named = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    layers = next((n for name in named for n in _listed(getattr(config, name, None))), 0)
    cut = _kinds(config, layers)
    vocabulary = getattr(config, "vocab_size", None)
    for name, value in list(_items(config)):
        if _is_config(value):
            _shrink(value, heads, widths, images, kept, (scale, fewer))
            continue
        if name in kept:
            continue
        new = value
        if isinstance(value, list) and layers > 2 and len(value) == layers and name != "hidden_sizes":
            new = [value[i] for i in cut]
        elif _number(value) and DEPTHS.search(name):
            new = len(cut) if value == layers and cut else min(value, 2)
        elif isinstance(value, (list, tuple)) and name in ("depths", "depth") and all(map(_number, value)):
            new = type(value)(min(n, 2) for n in value)
        elif fewer > 1 and _number(value) and HEADS.search(name):
            new = value // fewer if value % fewer == 0 else value
        elif scale * fewer > 1 and WIDTHS.search(name):
            new = _scaled(value, scale * fewer if TIED.search(name) else scale)
        elif _number(value) and EXPERTS.search(name):
            new = min(value, 4)
        elif _number(value) and CHOSEN.search(name):
            new = min(value, 2)
        elif _number(value) and GROUPS.search(name):
            new = 1
        elif name == "vocab_size" and _number(value):
            new = min(value, VOCABULARY)
        elif name.endswith("token_id") and _number(value) and _number(vocabulary) and value >= VOCABULARY:
            new = 3 + sum(map(ord, name)) % (VOCABULARY - 4)
        elif name in ("max_position_embeddings", "n_positions") and _number(value):
            new = min(value, 512)
        elif images and name == "image_size":
            new = _image(value, getattr(config, "patch_size", 16))
        if new is not value:
            with contextlib.suppress(AttributeError, ValueError, TypeError):  # some keys are computed and refuse
                setattr(config, name, new)


def _items(config: Any) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in vars(config).items() if not name.startswith("_"))


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _scale(config: Any) -> int:
    """By what all widths are divided: as much as leaves head dims of at least `HEAD_DIM`, and every width whole."""
    dims = [
        value for name, value in _items(config) if _number(value) and re.search(r"(head_dim|rope_head_dim|kv_channels)$", name) and value
    ]
    widths = [v for name, value in _items(config) if WIDTHS.search(name) and not HEADS.search(name) for v in _listed(value) if v]
    heads = [v for name, value in _items(config) if HEADS.search(name) for v in _listed(value)]
    if not dims and heads:
        names = ("embed_dim", "embed_dims", "hidden_size", "n_embd", "d_model", "dim", "hidden_sizes")
        widest = next((v for name in names for v in _listed(getattr(config, name, None))), 0)
        dims = [widest // heads[0]] if widest and heads[0] and widest % heads[0] == 0 else []
    if not dims or not widths:
        return 1
    common = math.gcd(*widths, *dims)
    fits = [s for s in range(1, common + 1) if common % s == 0 and min(dims) // s >= min(HEAD_DIM, min(dims))]
    return max((s for s in fits if all(d // s % 4 == 0 for d in dims if d % 4 == 0)), default=1)


def _listed(value: Any) -> list[int]:
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if _number(v)]


def _scaled(value: Any, scale: int) -> Any:
    if _number(value):
        return value // scale if value % scale == 0 else value
    return type(value)(_scaled(v, scale) for v in value) if isinstance(value, (list, tuple)) else value


def _image(value: Any, patch: Any) -> Any:
    size = 4 * max(_listed(patch) or [16])
    if isinstance(value, (list, tuple)):
        least = min(_listed(value) or [1])
        return type(value)(size * n // least if _number(n) else n for n in value)
    return size if _number(value) and value > size else value


def _kinds(config: Any, layers: int) -> list[int]:
    """Layers that together show every kind of layer, at least two."""
    lists = [value for _, value in _items(config) if isinstance(value, list) and len(value) == layers]
    for name in ("layer_types", "layers_block_type"):
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and len(value) == layers:
            lists.append(list(value))
    kinds = [tuple(map(str, (value[i] for value in lists))) for i in range(layers)]
    chosen = {kinds.index(kind) for kind in kinds[: layers if len(set(kinds)) <= 6 else 2]} | {0, min(1, max(layers - 1, 0))}
    computed = any(
        name not in vars(config) and isinstance(getattr(config, name, None), (list, tuple)) for name in ("layer_types", "layers_block_type")
    )
    return list(range(max(chosen) + 1)) if computed else sorted(chosen)


def _fewer(config: Any) -> int:
    """By what all head counts are divided: as much as leaves two of each that had more than one."""
    counts = {value for name, value in _items(config) if HEADS.search(name) and _number(value)}
    many = {n for n in counts if n > 1}
    if not many or any(HEADS.search(name) and isinstance(value, (list, tuple)) for name, value in _items(config)):
        return 1
    common = math.gcd(*many)
    return max(s for s in range(1, common + 1) if common % s == 0 and min(many) // s >= 2 and (max(many) // s >= 8 or s == 1))


def classes(config: Any) -> list[type[nn.Module]]:
    """Model classes for a config: the base model first, then others that take this very config."""
    from transformers import AutoModel, PreTrainedModel

    found: list[type[nn.Module]] = []
    with contextlib.suppress(KeyError, ValueError, ImportError, TypeError):
        entry: Any = AutoModel._model_mapping[type(config)]
        found += entry if isinstance(entry, (list, tuple)) else [entry]
    package = importlib.import_module(type(config).__module__.rsplit(".", 1)[0])
    for info in pkgutil.iter_modules(getattr(package, "__path__", [])):
        if info.name.startswith("modeling_"):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for name, cls in vars(module).items():
                if (
                    inspect.isclass(cls)
                    and issubclass(cls, PreTrainedModel)
                    and cls.__module__ == module.__name__
                    and not name.endswith("PreTrainedModel")
                    and getattr(cls, "config_class", None) is type(config)
                    and cls not in found
                ):
                    found.append(cls)
    return found


# what to call it with


def transformers_inputs(model: Any) -> list[Call]:
    """Calls to try: by the names that `forward` asks for, the main input first."""
    required = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    accepted = set(inspect.signature(model.forward).parameters)
    mains = [model.main_input_name] if isinstance(model.main_input_name, str) else list(model.main_input_name)
    names = list(dict.fromkeys([*required, *([n for n in mains if n in accepted] or [n for n in ("pixel_values",) if n in accepted])]))
    if "decoder_input_ids" in accepted:
        names.append("decoder_input_ids")
    calls: list[Call] = []
    for image in _images(model.config):
        made = {name: _made(name, model, image) for name in names}
        if all(value is not None for value in made.values()):
            calls.append(((), made))
            patches = made.get("pixel_values")
            if patches is not None and patches.dim() == 2:
                calls.append(((), made | {"pixel_values": _square(patches, model.config)}))
    if "input_ids" in accepted:
        calls.append(((), {"input_ids": _ids(model)}))
    if "inputs_embeds" in accepted:
        calls.append(((), {"inputs_embeds": torch.randn(1, TOKENS, _width(model.config))}))
    if len(names) == 1 and names[0] in ("hidden_states", "pixel_values"):
        calls += [((), {names[0]: torch.randn(1, 3, *image)}) for image in _images(model.config)]
    return calls


def _ids(model: Any) -> torch.Tensor:
    special = {v for name, v in vars(model.config).items() if name.endswith("token_id") and _number(v)}
    size = min(_get(model.config, "vocab_size", 100), VOCABULARY)
    plain = [i for i in range(2, size) if i not in special][:TOKENS]
    return torch.tensor([plain])


def _get(config: Any, name: str, default: Any) -> Any:
    value = getattr(config, name, None)
    if value is None:
        value = next((getattr(sub, name) for _, sub in _items(config) if _is_config(sub) and getattr(sub, name, None) is not None), default)
    return value


def _width(config: Any) -> int:
    for name in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim"):
        value = _get(config, name, None)
        if _number(value):
            return int(value)
    return 16


def _square(patches: torch.Tensor, config: Any) -> torch.Tensor:
    """Patches [n, c p p] as [n, c, p, p]."""
    patch = max(_listed(_get(config, "patch_size", 16)) or [16])
    return patches.reshape(-1, patches.shape[1] // patch**2, patch, patch) if patches.shape[1] % patch**2 == 0 else patches


def _images(config: Any) -> list[tuple[int, int]]:
    """Image sizes to try, smallest first."""
    size, patch = _get(config, "image_size", None), _get(config, "patch_size", 16)
    patch = max(_listed(patch) or [16])
    given = tuple(size)[-2:] if isinstance(size, (list, tuple)) and len(size) >= 2 else (size, size) if _number(size) else None
    return [*([given] if given else []), (4 * patch, 4 * patch), (64, 64), (224, 224), (256, 256)]


def _made(name: str, model: Any, image: tuple[int, int]) -> Any:
    config = model.config
    patch = max(_listed(_get(config, "patch_size", 16)) or [16])
    channels = next((v for n in ("num_channels", "in_channels", "in_chans") if _number(v := _get(config, n, None))), 3)
    merge = _get(config, "spatial_merge_size", 2)
    side = 2 * (merge if _number(merge) else 2)
    if name in ("input_ids", "decoder_input_ids", "aa"):
        return _ids(model)
    if name in ("grid_thw", "image_grid_thw"):
        return torch.tensor([[1, side, side]])
    if name in ("pixel_values", "image", "images", "prompt_pixel_values", "prompt_masks"):
        if "grid_thw" in inspect.signature(model.forward).parameters or "image_grid_thw" in inspect.signature(model.forward).parameters:
            return torch.randn(side * side, channels * patch * patch * _get(config, "temporal_patch_size", 1))
        frames = _get(config, "num_frames", None)
        return torch.randn(1, frames, channels, *image) if _number(frames) else torch.randn(1, channels, *image)
    if name == "hidden_states":
        if "grid_thw" in inspect.signature(model.forward).parameters:
            return torch.randn(side * side, channels * patch * patch * _get(config, "temporal_patch_size", 1))
        width = next(iter(_listed(getattr(config, "input_dim", None))), _width(config))
        return torch.randn(1, TOKENS, width)
    if name in ("inputs_embeds", "hidden_state", "query", "query_embeds", "encoder_hidden_states"):
        return torch.randn(1, TOKENS, _width(config))
    if name == "patch_embeds":
        return torch.randn(1, _width(config), 4, 4)
    if name == "input_features":
        width = next((v for n in ("num_mel_bins", "input_dim", "input_size", "feature_size") if _number(v := _get(config, n, None))), 80)
        return torch.randn(1, 2 * TOKENS, width)
    if name == "input_values":
        return torch.randn(1, 4000)
    if name in ("pixel_position_ids", "position_ids"):
        return torch.arange(TOKENS).view(1, -1)
    return None
