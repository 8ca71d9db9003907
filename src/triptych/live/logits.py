"""Two checkpoints run through transformers on the same tokens: the first module whose outputs differ, in ulps and relative L2.

Never a proof and never a bare pass: what was compared and how far apart it was is always said. `verify` proves, this shows what is left
of a difference when the model has run. No code that a checkpoint brings is executed.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import families, formats
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import MissingExtraError, TriptychError
from ..packed import BY_STAMP, same_rows
from ..pieces import listed

BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Significant bits of the dtypes that outputs have."""


@dataclass(frozen=True)
class Apart:
    """How far the outputs of one module are apart: the largest difference in ulps of `dtype`, the coarser one; the relative L2 norm."""

    module: str
    dtype: str
    ulps: float
    relative: float

    def __str__(self) -> str:
        return f"{self.module}   up to {self.ulps:.3g} ulps of {self.dtype}, relative L2 {self.relative:.2e}"


@dataclass(frozen=True)
class Logits:
    """What running both gave. `cannot`: why they were not run; else `modules` outputs were compared on `inputs`.

    `first`: the first module, in the order of execution, whose outputs are not bit for bit the same; `last`: the model's own output.
    """

    a: str
    b: str
    cannot: str = ""
    modules: int = 0
    differing: int = 0
    first: Apart | None = None
    last: Apart | None = None
    inputs: str = field(default="")

    @property
    def equal(self) -> bool:
        """Whether both ran and no output differs in any bit."""
        return not self.cannot and self.differing == 0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "equal": self.equal, "first": vars(self.first) if self.first else None,
                "last": vars(self.last) if self.last else None}  # fmt: skip

    def __str__(self) -> str:
        if self.cannot:
            return f"logits: not compared: {self.cannot}"
        head = f"logits: both run on {self.inputs}; outputs of {self.modules} modules compared, {self.differing} differ"
        if self.first is None:
            return f"{head}\n  {self.last}"
        return f"{head}\n  first    {self.first}\n  {self.last}"


def logits(a: str | Path, b: str | Path) -> Logits:
    """Run two checkpoints, folders with config.json, on the same small input and compare the output of every module.

    Raises MissingExtraError without transformers. A checkpoint that cannot be run is no error: `cannot` says why.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise MissingExtraError("transformers", "hf") from None
    models = []
    for path in (a, b):
        try:
            reason = _not_a_model(path)
            models.append(_load(path) if not reason else None)
        except _Unloadable as error:
            reason = str(error)
        if reason:
            return Logits(str(a), str(b), f"{path} cannot be run as a model: {reason}")
    return _compared(str(a), str(b), models)


class _Unloadable(Exception):
    """transformers does not make a model of a folder, or not of all its tensors."""


def _not_a_model(path: str | Path) -> str:
    """Why the code of its family would not read a checkpoint rightly, or nothing."""
    try:
        checkpoint = open_checkpoint(path, {}, {})
    except TriptychError as error:
        return error.what
    config = formats.read_config(checkpoint.stored)
    if not checkpoint.stored.is_folder or config is None:
        return "it is no folder with a config.json"
    return _other_layout(checkpoint, config)


def _other_layout(checkpoint: Checkpoint, config: dict[str, Any]) -> str:
    """The stamp against the record of the family: what the family's own code would read wrongly, or not find."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.stored.tensors.items()}
    said = families.declared(config, shapes, (), {})
    record = {name: one for one in said.projections for name in ([one.name] if one.fused else one.parts.values())}
    for packed in checkpoint.projections:
        if packed.source != BY_STAMP:
            continue
        names = [piece.tensor for piece in packed.pieces]
        one = record.get(names[0])
        if one is None:
            return f"{listed(names)} is no name of {said.family or config.get('model_type')} that its code reads as {packed.layout}"
        if packed.fused and not same_rows(packed.layout, packed.sizes, one.layout, one.sizes):
            return f"{names[0]} is laid out as {packed.layout} (stamp), and the code of {said.family} reads {one.layout}"
    return ""


def _load(path: str | Path) -> nn.Module:
    """The model of config.json with all its weights. Raises _Unloadable."""
    import transformers

    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            name = next(iter(getattr(config, "architectures", None) or ()), "")
            make = getattr(transformers, name, None) or transformers.AutoModel
            model, told = make.from_pretrained(path, config=config, dtype="auto", output_loading_info=True, local_files_only=True)
        except Exception as error:  # whatever transformers raises over a folder it does not like
            raise _Unloadable(f"{type(error).__name__}: {error}".split("\n")[0][:200]) from None
    for key, word in (
        ("missing_keys", "does not find"),
        ("unexpected_keys", "does not know"),
        ("mismatched_keys", "finds other shapes of"),
    ):
        if told.get(key):
            raise _Unloadable(f"transformers {word} {listed(sorted(map(str, told[key])))}")
    out: nn.Module = model.eval()
    return out


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading without reports and bars; what matters of it is in the loading info."""
    root = logging.getLogger("transformers")
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        root.setLevel(level)


def _compared(a: str, b: str, models: Sequence[nn.Module | None]) -> Logits:
    from .tiny import transformers_inputs

    one, two = (model for model in models if model is not None)
    failed = ""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        for args, kwargs in transformers_inputs(one):
            try:
                runs = [_run(model, args, kwargs) for model in (one, two)]
            except Exception as error:  # whatever the model's own code raises over an input it does not take
                failed = f"{type(error).__name__}: {error}"[:200]
                continue
            told = ", ".join(f"{key} {tuple(x.shape)}" for key, x in [*enumerate(args), *kwargs.items()] if isinstance(x, torch.Tensor))
            return _told(a, b, runs, told)
    return Logits(a, b, f"the models take no input that is known here: {failed}")


def _run(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Module and number of its call -> what it returned, in the order in which modules finished; "" is the model itself."""
    out: dict[str, torch.Tensor] = {}
    like = next(model.parameters())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, result: Any) -> None:
            for tensor in _tensors(result)[:1]:
                calls = sum(key.split("#")[0] == name for key in out)
                out[f"{name}#{calls}" if calls else name] = tensor.detach().clone()

        return hook

    def fit(x: Any) -> Any:
        return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        model(*map(fit, args), **{key: fit(x) for key, x in kwargs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return out


def _tensors(result: Any) -> list[torch.Tensor]:
    """The floating tensors in what a module returns, the first of them first."""
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() else []
    values = result.values() if hasattr(result, "values") else result if isinstance(result, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _told(a: str, b: str, runs: Sequence[dict[str, torch.Tensor]], inputs: str) -> Logits:
    one, two = runs
    shared = [name for name, x in one.items() if name in two and two[name].shape == x.shape]
    differing = [name for name in shared if not _same(one[name], two[name])]
    last = _apart("output", one[""], two[""]) if "" in shared else None
    first = _apart(differing[0] or "output", one[differing[0]], two[differing[0]]) if differing else None
    return Logits(a, b, "", len(shared), len(differing), first, last, inputs)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool(((x.double() == y.double()) | (x.isnan() & y.isnan())).all())


def _apart(name: str, x: torch.Tensor, y: torch.Tensor) -> Apart:
    dtype = min((x.dtype, y.dtype), key=lambda kind: BITS.get(kind, 64))
    one, two = x.double(), y.double()
    difference = (one - two).abs()
    size = torch.maximum(one.abs(), two.abs()).clamp_min(torch.finfo(dtype).tiny)
    ulp = torch.exp2(torch.floor(torch.log2(size)) - (BITS.get(dtype, 64) - 1))
    norm = float(one.norm())
    relative = float(difference.norm()) / norm if norm else float(difference.norm() > 0)
    return Apart(name, str(dtype).removeprefix("torch."), float((difference / ulp).max()) if difference.numel() else 0.0, relative)
