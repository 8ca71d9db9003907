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
from ..rope import names_pairs
from ..tensors import split

BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Significant bits of the dtypes that outputs have."""
ROUNDING = 16
"""Units of the last place, in relative L2, that the same sums in another order may lie apart."""


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

    `first`: the first module, in the order of execution, whose outputs are not bit for bit the same; `beyond`: the first whose outputs are
    further apart than rounding brings them, which it does where the two are run by different code; `last`: the model's own output.
    """

    a: str
    b: str
    cannot: str = ""
    modules: int = 0
    differing: int = 0
    first: Apart | None = None
    beyond: Apart | None = None
    last: Apart | None = None
    inputs: str = field(default="")

    @property
    def equal(self) -> bool:
        """Whether both ran and no output differs in any bit."""
        return not self.cannot and self.differing == 0

    def to_dict(self) -> dict[str, Any]:
        apart = {word: vars(one) if one else None for word, one in (("first", self.first), ("beyond", self.beyond), ("last", self.last))}
        return {**vars(self), "equal": self.equal, **apart}

    def __str__(self) -> str:
        if self.cannot:
            return f"logits: not compared: {self.cannot}"
        head = f"logits: both run on {self.inputs}; outputs of {self.modules} modules compared, {self.differing} differ"
        if self.first is None:
            return f"{head}\n  {self.last}"
        if self.beyond == self.first:
            return f"{head}\n  first    {self.first}\n  {self.last}"
        beyond = f"beyond   {self.beyond}" if self.beyond else "none is further apart than rounding brings them"
        return f"{head}\n  first    {self.first}\n  {beyond}\n  {self.last}"


def logits(a: str | Path, b: str | Path) -> Logits:
    """Run two checkpoints, folders with config.json, on the same small input and compare the output of every module.

    Raises MissingExtraError without transformers. A checkpoint that cannot be run is no error: `cannot` says why.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise MissingExtraError("transformers", "hf") from None
    models, known = [], []
    for path in (a, b):
        try:
            known.append(_opened(path))
            models.append(_load(path))
        except _Unloadable as error:
            return Logits(str(a), str(b), f"{path} cannot be run as a model: {error}")
    return _compared(str(a), str(b), models, known)


class _Unloadable(Exception):
    """transformers does not make a model of a folder, or not of all its tensors."""


def _opened(path: str | Path) -> Checkpoint:
    """A checkpoint that the code of its family reads rightly. Raises _Unloadable."""
    try:
        checkpoint = open_checkpoint(path, {}, {})
        config = formats.read_config(checkpoint.stored)
    except TriptychError as error:
        raise _Unloadable(error.what) from None
    if not checkpoint.stored.is_folder or config is None:
        raise _Unloadable("it is no folder with a config.json")
    if reason := _other_layout(checkpoint, config):
        raise _Unloadable(reason)
    return checkpoint


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
    for parameter in out.parameters():  # both models at the same alignment: kernels round as it is
        parameter.data = parameter.data.clone()
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


def _compared(a: str, b: str, models: Sequence[nn.Module], known: Sequence[Checkpoint]) -> Logits:
    from .tiny import transformers_inputs

    one, two = models
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
            return _told(a, b, _matched(runs, known), told)
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


Outputs = list[tuple[str, torch.Tensor, torch.Tensor]]


def _matched(runs: Sequence[dict[str, torch.Tensor]], known: Sequence[Checkpoint]) -> Outputs:
    """(name, output of a, output of b) by module; part by part where a projection is one module of a and several of b, or the other way."""
    one, two = runs
    parts = [_parts(run, checkpoint) for run, checkpoint in zip(runs, known, strict=True)]
    out: Outputs = []
    for name, x in one.items():
        if name in two and two[name].shape == x.shape:
            out.append((name, x, two[name]))
            continue
        for key, (module, y) in parts[0].items():
            there, z = parts[1].get(key, ("", y))
            if module == name and there and z.shape == y.shape:
                out.append((f"{name} and {there}, part {key[1]}", y, z))
    return out


def _parts(run: dict[str, torch.Tensor], checkpoint: Checkpoint) -> dict[tuple[str, str], tuple[str, torch.Tensor]]:
    """(home of a projection, part) -> the module that makes it, and its output [..., heads, dims] in counting order."""
    out: dict[tuple[str, str], tuple[str, torch.Tensor]] = {}
    for packed in checkpoint.projections:
        for piece in packed.pieces:
            name = piece.tensor.removesuffix(".weight")
            module = next((key for key in run if key and (key == name or key.endswith(f".{name}") or name.endswith(f".{key}"))), None)
            if name == piece.tensor or module is None or names_pairs(piece.layout):
                continue
            parts = split(run[module], piece.layout, **{axis: packed.sizes[axis] for axis in piece.layout.axes})
            home = name.rpartition(".")[0].partition(".")[2]
            out |= {(home, part): (module, rows) for part, rows in zip(parts.names, parts, strict=True)}
    return out


def _told(a: str, b: str, shared: Outputs, inputs: str) -> Logits:
    if not shared:
        return Logits(a, b, "no module of one has the name and the shape of one of the other")
    differing = [(name, x, y) for name, x, y in shared if not _same(x, y)]
    last = next((_apart("output", x, y) for name, x, y in shared if not name), None)
    far = (_apart(name or "output", x, y) for name, x, y in differing)
    first = next(far, None)
    beyond = next((one for one in (first, *far) if one and one.relative > ROUNDING * 2.0 ** -BITS.get(getattr(torch, one.dtype), 64)), None)
    return Logits(a, b, "", len(shared), len(differing), first, beyond, last, inputs)


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
