"""For every lint rule a checkpoint that it must find fault with and one, as near to it as possible, that it must not.

python -m tests.lint_cases      writes what `triptych lint` says of the first into the pages of docs/lint, and their text into lint/pages.py
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import triptych as tt
from triptych import cli, stamp

from . import crafted, weights

PAGES = Path(__file__).parent.parent / "docs" / "lint"
TEXT = Path(__file__).parent.parent / "src" / "triptych" / "lint" / "pages.py"
BLOCK = re.compile(r"(?<=```console norun\n).*?(?=```)", re.DOTALL)
Tensors = dict[str, np.ndarray]
Case = Callable[[Path], None]
NEOX = {"model_type": "gpt_neox", "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "vocab_size": 11}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "head_dim": 4,
}
QKV = "gpt_neox.layers.{}.attention.query_key_value.weight"
NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def noise(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def neox(layers: int = 2) -> Tensors:
    """h=3 d=8, rows `h (q|k|v) d`."""
    out = {"gpt_neox.embed_in.weight": noise(11, 24, seed=99)}
    for i in range(layers):
        home = f"gpt_neox.layers.{i}.attention."
        out |= {home + "query_key_value.weight": noise(72, 24, seed=i), home + "query_key_value.bias": np.zeros(72, np.float32)}
        out |= {home + "dense.weight": noise(24, 24, seed=10 + i)}
    return out


def llama() -> Tensors:
    """Three layers, h=6 g=2 d=4."""
    parts = {"q": 24, "k": 8, "v": 8}
    names = [(f"model.layers.{i}.self_attn.{part}_proj.weight", rows) for i in range(3) for part, rows in parts.items()]
    return {name: noise(rows, 24, seed=seed) for seed, (name, rows) in enumerate(names)}


def single(folder: Path, tensors: Tensors, config: Mapping[str, Any] | None = NEOX, metadata: dict[str, str] | None = None) -> None:
    """A folder with one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def sharded(
    folder: Path, first: Tensors, second: Tensors, config: Mapping[str, Any] = NEOX, listed: Mapping[str, str] | None = None, more: int = 0
) -> None:
    """A folder with two shards; `listed` replaces entries of the index, a file of "" removes one; `more` is added to its total size."""
    single(folder, {"x": noise(1, seed=0)}, config)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for name, shard in zip(NAMES, (first, second), strict=True):
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(array.nbytes for array in {**first, **second}.values()) + more
    weight_map = {name: file for name, file in {**weight_map, **(listed or {})}.items() if file}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    names = list(tensors)
    return {name: tensors[name] for name in names[:4]}, {name: tensors[name] for name in names[4:]}


def healthy(folder: Path) -> None:
    sharded(folder, *halves(neox()))


def changed(name: str, change: Callable[[np.ndarray], object]) -> Case:
    """One file in which one tensor was changed."""

    def make(folder: Path) -> None:
        tensors = neox()
        change(tensors[name])
        single(folder, tensors)

    return make


def then(make: Case, do: Callable[[Path], object]) -> Case:
    def both(folder: Path) -> None:
        make(folder)
        do(folder)

    return both


def file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def pickled(value: bytes) -> Case:
    numbers = {b"a/data/0": noise(6, seed=5).tobytes()}
    return then(healthy, file("training_args.bin", crafted.torch_file(crafted.table(w=crafted.tensor(), x=value), numbers)))


def stamped(layout: str, sizes: dict[str, int], tensors: Tensors, names: list[str]) -> dict[str, str]:
    told = tt.Layout(layout)
    entries = [(name, stamp.Stamped(told, tt.bind(told, **sizes), 0, name)) for name in names]
    return {"triptych": stamp.encode(entries, "none")}


def with_stamp(layout: str, sizes: dict[str, int]) -> Case:
    def make(folder: Path) -> None:
        names = [QKV.format(i) for i in range(2)]
        single(folder, neox(), NEOX, stamped(layout, sizes, neox(), names))

    return make


@cache
def minilm(layers: int = 2) -> Tensors:
    """Trained layers with their output projections, fused as `(q|k|v) h d`; h=12 d=32."""
    out = {}
    with safe_open(weights.minilm(), "np") as source:
        for i in range(layers):
            home = f"encoder.layer.{i}.attention."
            parts = [source.get_tensor(f"{home}self.{part}.weight") for part in ("query", "key", "value")]
            out[f"h.{i}.attn.qkv.weight"] = np.concatenate(parts)
            out[f"h.{i}.attn.o_proj.weight"] = source.get_tensor(f"{home}output.dense.weight")
    return out


def trained(layout: str) -> Case:
    """The trained layers, stamped with a layout."""

    def make(folder: Path) -> None:
        names = [name for name in minilm() if "qkv" in name]
        single(folder, minilm(), None, stamped(layout, {"h": 12, "d": 32}, minilm(), names))

    return make


def drop(name: str, tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


def typed(name: str, tensors: Tensors, dtype: Any) -> Tensors:
    return {key: value.astype(dtype) if key == name else value for key, value in tensors.items()}


def fill(part: int, heads: list[int], value: object) -> Callable[[np.ndarray], None]:
    """Sets the rows of one part of some heads of `h (q|k|v) d`."""

    def change(tensor: np.ndarray) -> None:
        tensor.reshape(3, 3, 8, 24)[heads, part] = value

    return change


def put(*index: int, value: float) -> Callable[[np.ndarray], None]:
    def change(tensor: np.ndarray) -> None:
        tensor[index] = value

    return change


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, size)


def renamed(old: str, new: str, tensors: Tensors) -> Tensors:
    return {new if name == old else name: value for name, value in tensors.items()}


def shards_alone(folder: Path) -> None:
    healthy(folder)
    (folder / INDEX).unlink()


def doubled(folder: Path) -> None:
    first, second = halves(neox())
    sharded(folder, first, {**second, QKV.format(0): noise(72, 24, seed=50)}, listed={QKV.format(0): NAMES[0]})


def split_over(folder: Path) -> None:
    tensors = llama()
    name = "model.layers.1.self_attn.v_proj.weight"
    sharded(folder, drop(name, tensors), {name: tensors[name]}, LLAMA)


def together(folder: Path) -> None:
    tensors = llama()
    first = {name: value for name, value in tensors.items() if ".0." in name}
    sharded(folder, first, {name: value for name, value in tensors.items() if name not in first}, LLAMA)


V1, Q0 = "model.layers.1.self_attn.v_proj.weight", "model.layers.0.self_attn.q_proj.weight"
DENSE = "gpt_neox.layers.0.attention.dense.weight"
TINY = 1e-30 * noise(3, 8, 24, seed=7)
STALE = "model-00003-of-00003.safetensors"

CASES: dict[str, tuple[Case, Case]] = {
    "unreadable-file": (then(healthy, cut(NAMES[1], 5000)), healthy),
    "missing-shard": (then(healthy, lambda folder: (folder / NAMES[1]).unlink()), healthy),
    "missing-index": (shards_alone, healthy),
    "missing-tensor": (lambda folder: sharded(folder, *halves(neox()), listed={"gpt_neox.norm.weight": NAMES[0]}), healthy),
    "unlisted-tensor": (lambda folder: sharded(folder, *halves(neox()), listed={QKV.format(0): ""}), healthy),
    "stale-shard": (
        then(healthy, lambda folder: save_file({"old": noise(2, seed=1)}, folder / STALE)),
        then(healthy, lambda folder: save_file({"head.weight": noise(2, seed=1)}, folder / "classifier.safetensors")),
    ),
    "double-tensor": (doubled, healthy),
    "total-size": (lambda folder: sharded(folder, *halves(neox()), more=-96), healthy),
    "two-weight-sets": (
        then(healthy, lambda folder: save_file(neox(), folder / "model.safetensors")),
        then(healthy, lambda folder: save_file({"lora_A": noise(2, seed=1)}, folder / "adapter_model.safetensors")),
    ),
    "missing-layer": (
        lambda folder: single(folder, {k: v for k, v in neox(4).items() if ".2." not in k}, {**NEOX, "num_hidden_layers": 4}),
        lambda folder: single(folder, neox(4), {**NEOX, "num_hidden_layers": 4}),
    ),
    "unfinished": (then(healthy, file(f".{NAMES[0]}.triptych-part", b"half")), then(healthy, file(".gitattributes", b""))),
    "unprintable-name": (
        lambda folder: single(folder, renamed(DENSE, "dense\x1b[2K.weight", neox())),
        lambda folder: single(folder, renamed(DENSE, "dichte \u00e4 \u5bc6.weight", neox())),
    ),
    "unsafe-pickle": (pickled(b"cposix\nsystem\n(" + crafted.text("true") + b"tR"), pickled(crafted.text("posix system"))),
    "pickle-objects": (pickled(b"cargparse\nNamespace\n)R"), pickled(b"ccollections\nOrderedDict\n)R")),
    "incomplete-projection": (
        lambda folder: single(folder, drop(V1, llama()), LLAMA),
        lambda folder: single(folder, llama(), LLAMA),
    ),
    "split-projection": (split_over, together),
    "mixed-dtype": (
        lambda folder: single(folder, typed(Q0, llama(), np.float16), LLAMA),
        lambda folder: single(folder, typed("gpt_neox.embed_in.weight", neox(), np.float16)),
    ),
    "config-shapes": (lambda folder: single(folder, neox(), {**NEOX, "hidden_size": 48}), healthy),
    "unknown-layout": (
        lambda folder: single(folder, neox(), None),
        lambda folder: single(folder, neox(), None, stamped("h (q|k|v) d", {"h": 3, "d": 8}, neox(), [n for n in neox() if "query" in n])),
    ),
    "stamp": (with_stamp("h (q|k|v) d", {"h": 3, "d": 16}), with_stamp("h (q|k|v) d", {"h": 3, "d": 8})),
    "stamp-config": (with_stamp("(q|k|v) h d", {"h": 3, "d": 8}), with_stamp("h (q|k|v) d", {"h": 3, "d": 8})),
    "weights-contradict": (trained("h (q|k|v) d"), trained("(q|k|v) h d")),
    "not-finite": (
        changed(DENSE, lambda tensor: (put(3, 4, value=np.nan)(tensor), put(3, 5, value=-np.inf)(tensor))),
        changed(DENSE, put(3, 4, value=3e38)),
    ),
    "zero-part": (changed(QKV.format(1), fill(1, [0, 1, 2], 0)), changed(QKV.format(1), fill(1, [0, 1, 2], TINY))),
    "zero-rows": (changed(QKV.format(1), fill(2, [1], 0)), changed(QKV.format(1), put(9, value=0.0))),
    "untrained-part": (
        changed(QKV.format(0), fill(2, [0, 1, 2], noise(24, seed=7))),
        changed(QKV.format(0), fill(2, [0, 1], noise(24, seed=7))),
    ),
}  # fmt: skip
"""Rule -> a case with the fault, one without."""
OPTIONS = {"weights-contradict": ("--check-weights",)}


def said(rule: str, place: Path) -> str:
    """What the command line prints of the rule's bad case, written to `place`/model."""
    CASES[rule][0](place / "model")
    words = ("lint", "model", *OPTIONS.get(rule, ()))
    out = io.StringIO()
    with chdir(place), redirect_stdout(out), redirect_stderr(out):
        try:
            cli.main(words)
        except SystemExit as done:
            code = int(str(done.code))
    text = "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
    return f"$ triptych {' '.join(words)}\n{text}" + (f"exit code {code}\n" if code else "")


def text_of_pages() -> str:
    """src/triptych/lint/pages.py: what the pages say of every rule, without title, example and links."""
    head = "What the pages of docs/lint say of every rule, for reports that are read far from them; `python -m tests.lint_cases` writes it."
    lines = [f'"""{head}"""', "", "from __future__ import annotations", "", "TEXTS = {"]
    for rule in sorted(CASES):
        page = (PAGES / f"{rule}.md").read_text("utf-8")
        about, remedy = page.partition("\n")[2].partition("## Example")[0], page.partition("## Remedy")[2]
        text = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", f"{about.strip()}\n\n## Remedy\n\n{remedy.strip()}")
        lines.append(f'    "{rule}": """\\\n{text}""",')
    return "\n".join([*lines, "}", '"""Rule -> Markdown."""', ""])


def main() -> int:
    for rule in CASES:
        with tempfile.TemporaryDirectory() as place:
            page = PAGES / f"{rule}.md"
            block = said(rule, Path(place))
            page.write_text(BLOCK.sub(lambda match, block=block: block, page.read_text("utf-8")), "utf-8")
    TEXT.write_text(text_of_pages(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
