"""What `bench/fuzz.py` fuzzes: for each parser its seeds, how it is run, its exit codes, and what its results must agree with."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

LONGEST = 4096
"""Bytes of an input."""


class Target(NamedTuple):
    """`read` is watched; `exits` are the exit codes its errors may have; `agree` says what is wrong with a result, or with a refusal."""

    seeds: Iterable[bytes]
    read: Callable[[bytes], object]
    exits: tuple[int, ...]
    agree: Callable[[bytes, Any, Exception | None], str | None] = lambda data, result, error: None
    words: Iterable[str] = ()


class Held:
    """A file that is given new content again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def put(self, data: bytes) -> Path:
        os.ftruncate(self.fd, len(data))
        os.pwrite(self.fd, data, 0)
        return self.path


def error_type() -> type[Exception]:
    from triptych.errors import TriptychError

    return TriptychError


def text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# Seeds: the files that tests/hostile.py breaks, and good ones


def cases(kind: str, file: str = "") -> Iterator[bytes]:
    """The files of one kind in tests/hostile.py that are small and regular."""
    from tests.hostile import CASES

    for case in CASES:
        if case.kind == kind:
            with tempfile.TemporaryDirectory() as name:
                path = case.make(Path(name))
                path = path / file if file else path
                if path.is_file() and path.stat().st_size <= LONGEST:
                    yield path.read_bytes()


def good() -> dict[str, bytes]:
    from tests.test_hostile import GOOD

    return GOOD


def programs() -> Iterator[bytes]:
    """Pickles of torch files, made by hand and by torch."""
    import torch

    weight = torch.arange(6.0).reshape(2, 3)
    linear = torch.nn.Linear(3, 2)
    values = ({"w": weight}, linear.state_dict(), {"state_dict": {"w": weight}, "step": 5, "args": {"lr": [1e-3, None, True]}},
              {"w": weight.T, "p": torch.nn.Parameter(weight), "n": {"x": [weight, weight.half()]}})  # fmt: skip
    made = []
    for value in values:
        out = io.BytesIO()
        torch.save(value, out)
        made.append(out.getvalue())
    for raw in [*made, *cases("torch")]:
        with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(raw)) as archive:
            yield from (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


# Targets


def layout(place: Path) -> Target:
    from triptych.layout import Layout, count
    from triptych.rowmap import parts
    from triptych.sizes import bind

    def agree(data: bytes, made: Any, error: Exception | None) -> str | None:
        if made is None:
            return None
        again = Layout(str(made))
        if again != made or again.factors != made.factors or str(again) != str(made) or again.parts != made.parts:
            return "its text is another layout"
        with contextlib.suppress(error_type()):
            sizes = bind(made, **dict.fromkeys((axis for axis in made.axes if axis != "m"), 2))
            if (total := count(made.factors, sizes)) <= 256:
                rows = sorted(row for part in parts(made, sizes) for row in part.rows().ravel().tolist())
                return None if rows == list(range(total)) else "its parts do not cover its rows"
        return None

    seeds = (b"h (q|k|v) d", b"(q h|k g|v g) d", b"g (q r|k|v) d", b"m (q|v|k) n d", b"(q|k=v) h d", b"_ g (q r|k|v) d|gate h",
             b"h (q|k|v) (rot c p|pass n)", b"(q|k=0|v) h p c", b"q h|k", b"t (q n r|k n|v n) d", b"(q (a|b)|k (a|b)) d")  # fmt: skip
    return Target(
        seeds, lambda data: Layout(text(data)), (2,), agree, ("h", "g", "(q|k|v)", "=0", "_", "|", "(", ")", "c p", "m", "t", "k=v", "->")
    )


def sizes(place: Path) -> Target:
    """Sizes as the command line takes them: a layout, then one size in each line."""
    from triptych.cli import main

    def read(data: bytes) -> object:
        layout, *words = text(data).split("\n")[:8]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                main(["explain", *(item for word in words for item in ("-s", word)), "--", layout])
            except SystemExit as end:
                if end.code not in (0, 2, None):
                    raise AssertionError(f"exit code {end.code}: {out.getvalue()[-300:]}") from None
        return out.getvalue()

    seeds = (b"h (q|k|v) d\nh=4\nd=32", b"g (q r|k|v) d\nh=32\ng=8\nd=128", b"m (q|v|k) n d\nm=4\nn=2\nd=3", b"h d\nh=0\nd=-1",
             b"h d\nh=99999999999999999\nd=1", b"h (rot c p|pass n)\nh=2\np=4\nn=3", b"nobody")  # fmt: skip
    return Target(seeds, read, (), words=("h=", "g=", "r=", "d=", "=", "=1", "=2", "=64", "t=", "m=", "n=", "c=2", "p="))


def formula(place: Path) -> Target:
    from triptych.families.formula import Missing, evaluate, keys

    config = {"heads": 8, "hidden": 64, "kinds": ["full", "half"], "depths": [2, 2, 6], "x": None, "f": 0.5, "flag": True, "t": {"a": 1}}

    def read(data: bytes) -> object:
        words = text(data)
        return keys(words), evaluate(words, lambda name: config.get(name, Missing(name)))

    seeds = (b"head_dim or hidden / heads", b"kinds[1] == 'full' and not flag", b"round_up(hidden, 6) if flag else int(f * hidden)",
             b"stage(3, depths) // 2 % 3", b"max(heads, min(2, 3))-ceil(f)", b"kinds[0] in ('full', 'half')", b"-heads if x is None else t",
             "\u00e9 or 1".encode())  # fmt: skip
    words = ("hidden", "heads", "round_up(", "stage(", "ceil(", "int(", "min(", "max(", " if ", " else ", " or ", " and ", "not ", "//",
             "%", "depths", "kinds[", "1e9", "1e-300")  # fmt: skip
    return Target(seeds, read, (3,), words=words)


def records(place: Path) -> Target:
    """Family records, and what they then say of a checkpoint."""
    from triptych.families import declared
    from triptych.families.records import DATA, parse_records

    config = {"model_type": "my_decoder", "n_heads": 4, "dim": 12, "n_kv_heads": 2, "layers": ["a", "b"]}
    shapes = {f"layers.{i}.attn.{name}": shape for i in range(2) for name, shape in (
        ("qkv.weight", (24, 12)), ("qkv.bias", (24,)), ("q.weight", (12, 12)), ("k.weight", (6, 12)), ("v.weight", (6, 12)),
        ("c_attn.weight", (12, 24)))}  # fmt: skip

    def read(data: bytes) -> object:
        return declared(config, shapes, parse_records(text(data), "records.toml"))

    keys = ("fused", "join", "layout", "sizes", "parts", "axis = ", "when", "beside", "rope", "rotary", "tails", "like", "template",
            "defaults", "either", "ambiguous", "kind", "name", "companions")  # fmt: skip
    head = '[[family]]\ntypes = ["my_decoder"]\nsource = "x:1"\n[[family.tensor]]\n'
    bodies = (
        'fused = "layers.{L}.attn.qkv"\nlayout = "(q h|k g|v g) d"\nsizes = {h = "n_heads", d = "dim / n_heads"}\nrope = "half"',
        'join = "layers.*.attn.qkv"\nlayout = "(q h|k g|v g) d"\nparts = {q = "q", k = "k", v = "v"}\nsizes = {h = "n_heads"}',
        'fused = ["attn.c_attn", "attn.qkv"]\nlayout = "(q|k|v) h d"\naxis = 1\nwhen = "layers[L] == \'a\'"\nkind = "mlp"',
        'fused = "qkv"\nlayout = "h (q|k|v) d"\nbeside = ["!k"]\ntails = [".weight"]\nambiguous = ["(q|k|v) h d"]\nrotary = "dim"',
    )
    pages = [path.read_text("utf-8") for path in sorted(DATA.glob("*.toml"))]
    blocks = [f"[[family]]{block}" for page in pages for block in page.split("[[family]]")[1:] if len(block) < 1500]
    seeds = [head + body for body in bodies] + [block.replace('types = ["', 'types = ["my_decoder", "') for block in blocks[::4]]
    return Target([seed.encode() for seed in seeds], read, (3,), words=(*keys, "{L}", "{S}", "*", "[[family]]", "[[family.tensor]]"))


def config(place: Path) -> Target:
    """config.json beside the fused tensors of several families: what the records say of them."""
    from tests.crafted import entry, neox, safetensors_file

    from triptych import inspect, plan

    names = {"gpt_neox.layers.0.attention.query_key_value.weight": [12, 4], "transformer.h.0.attn.c_attn.weight": [4, 12],
             "model.layers.0.self_attn.qkv_proj.weight": [12, 4], "transformer.h.1.self_attention.query_key_value.weight": [8, 4],
             "model.layers.1.mlp.gate_up_proj.weight": [8, 4], "encoder.layers.0.self_attn.in_proj_weight": [12, 4],
             "model.layers.2.self_attn.q_proj.weight": [4, 4], "model.layers.2.self_attn.k_proj.weight": [2, 4],
             "model.layers.2.self_attn.v_proj.weight": [2, 4], "model.layers.3.self_attn.kv_b_proj.weight": [12, 4]}  # fmt: skip
    table, at = {}, 0
    for name, (rows, columns) in names.items():
        table[name] = entry(at, at + rows * columns, "U8", [rows, columns])
        at += rows * columns
    (place / "model.safetensors").write_bytes(safetensors_file(table, bytes(at)))
    held = Held(place / "config.json")

    def read(data: bytes) -> object:
        held.put(data)
        found = inspect(place)
        return str(found), json.dumps(found.to_dict()), found.projections and plan(place, "keep")

    sized = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 4, "intermediate_size": 4, "head_dim": 2}
    types = ("gpt_neox", "gpt2", "phi3", "falcon", "bloom", "llama", "chatglm", "deepseek_v3", "mpt", "qwen3_next", "codegen", "dbrx")
    seeds = [json.dumps({"model_type": kind, **sized}).encode() for kind in types]
    seeds += [json.dumps({"model_type": "llava", "text_config": {"model_type": "llama", **sized}, "vision_config": {}}).encode()]
    seeds += [json.dumps(neox(num_attention_heads=[2], hidden_size=1e308, per_layer_config={"0": {"head_dim": 2}})).encode()]
    words = [f'"{key}":' for key in (*sized, "model_type", "text_config", "n_head", "n_embd", "multi_query", "new_decoder_architecture",
             "layer_types", "per_layer_config", "attn_config", "kv_n_heads", "num_kv_heads", "q_lora_rank", "v_head_dim")]  # fmt: skip
    words += [f'"{kind}"' for kind in types] + ["null", "true", "1e308", "-1", "9223372036854775808", "[]", "{}", "0.5", '""']
    return Target([*seeds, *cases("folder", "config.json"), *cases("plan", "config.json")], read, (3, 4), words=words)


HEADER = ('"dtype":', '"shape":', '"data_offsets":', '"__metadata__":', '"F32"', '"U8"', '"F4"', '"BF16"', "[0,4]", "[]", "{}", "null",
          "-0", "1e0", "18446744073709551615")  # fmt: skip
STRICTER = {
    "the JSON cannot be read": "a key or a name that stands twice, a lone surrogate, a number of thousands of digits",
    "a tensor's entry is malformed": "keys beside dtype, shape and data_offsets",
    "__metadata__ is no table of texts": "__metadata__: null",
    "a shape is no list of natural numbers": "more than 64 axes, or one of 2^63",
    "a shape is too large": "no elements, and 2^63 without the zeros",
    "an offset is no natural number": "an offset of 2^63",
    "the JSON holds too much": "a million lists",
}
"""Why we refuse a file that the safetensors package reads: headline -> what it is."""


def safetensors(place: Path) -> Target:
    """A whole file, or what begins with a bracket: a header, to which its length is set and the data that it asks for."""
    import safetensors as theirs
    from tests.crafted import safetensors_file

    from triptych.formats import read_header

    held = Held(place / "a.safetensors")

    def whole(data: bytes) -> bytes:
        wanted = [int(number) for number in re.findall(rb"(\d{1,4})\s*\]", data)]
        return safetensors_file(data, bytes(max(wanted, default=0))) if data[:1] == b"{" else data

    def agree(data: bytes, header: Any, error: Any) -> str | None:
        data = whole(data)
        try:
            found = {name: (told["dtype"], tuple(told["shape"]), bytes(told["data"])) for name, told in theirs.deserialize(data)}
        except Exception as raised:
            lax = b"-0" in data  # a 0 to us
            return f"we read what safetensors refuses: {raised}"[:200] if header and not lax else None
        if header is None:
            return None if error.what in STRICTER else f"safetensors reads it, we do not: {error.what}"
        mine = {tensor.name: (tensor.dtype, tensor.shape, data[tensor.start : tensor.stop]) for tensor in header.tensors}
        return None if mine == found else "safetensors reads other tensors"

    files = [*cases("safetensors"), good()["a.safetensors"]]
    seeds = [*files, *(file[8:].rpartition(b"}")[0] + b"}" for file in files)]
    return Target(seeds, lambda data: read_header(held.put(whole(data))), (3,), agree, HEADER)


def index(place: Path) -> Target:
    from tests.crafted import index as make

    from triptych import formats

    make({"w": "model1.safetensors"})(place)
    held = Held(place / "model.safetensors.index.json")
    seeds = [*cases("folder", held.path.name), b'{"metadata":{"total_size":4},"weight_map":{"w":"model1.safetensors"}}']
    words = ('"weight_map":', '"metadata":', '"w":', '"model1.safetensors"', "..", "/", "{}", "[]", "null")

    def read(data: bytes) -> object:
        held.put(data)
        return formats.read(place)

    def agree(data: bytes, stored: Any, error: Exception | None) -> str | None:
        return "another tensor or file" if stored and (list(stored.tensors), len(stored.files)) != (["w"], 1) else None

    return Target(seeds, read, (3,), agree, words)


def stamp(place: Path) -> Target:
    """The text of a stamp, in a file of five tensors."""
    from tests.crafted import entry, safetensors_file

    from triptych import inspect

    held = Held(place / "a.safetensors")
    shapes = {"x.qkv.weight": [24, 2], "x.qkv.bias": [24], "x.q.weight": [12, 2], "x.k.weight": [6, 2], "x.v.weight": [6, 2]}
    table, at = {}, 0
    for name, shape in shapes.items():
        size = shape[0] * (shape[1] if len(shape) > 1 else 1)
        table[name] = entry(at, at + size, "U8", shape)
        at += size

    def read(data: bytes) -> object:
        held.put(safetensors_file({**table, "__metadata__": {"triptych": text(data)}}, bytes(at)))
        found = inspect(held.path)
        return str(found), json.dumps(found.to_dict())

    fused = {"layout": "(q h|k g|v g) d", "sizes": {"h": 4, "g": 2, "d": 3}, "axis": 0, "projection": "y", "rope": "half"}
    names = {part: f"x.{part}.weight" for part in "qkv"}
    parts = {names[part]: {"layout": f"({part} {axis} d)", "sizes": {axis: n, "d": 3}, "axis": 0, "projection": "x.qkv", "parts": names}
             for part, axis, n in (("q", "h", 4), ("k", "g", 2), ("v", "g", 2))}  # fmt: skip
    seeds = [json.dumps({"version": 1, "plan": "x", "layouts": layouts}).encode() for layouts in ({}, {"x.qkv.weight": fused}, parts)]
    words = [*(f'"{name}":' for name in (*shapes, *fused, "parts", "layouts", "version", "h", "g", "d", "kind")),
                       '"h (q|k|v) d"', '"(q|k|v) h d"', "{}", "[]", "null", "-1", "true", "1e3", "99999999999999999999"]  # fmt: skip
    return Target(seeds, read, (3, 4), words=words)


OPCODES = (r"ctorch._utils\x0a_rebuild_tensor_v2\x0a", r"ctorch\x0aFloatStorage\x0a", r"ccollections\x0aOrderedDict\x0a", r"q\x00",
           r"h\x00", "tR", "tQ", "}(", "u", r"\x89", r"\x85", r"X\x01\x00\x00\x00w")  # fmt: skip


def _same_as_torch(data: bytes, file: Any, error: Exception | None) -> str | None:
    """Tensors that both torch and we read, under one name at the top of the table, have one dtype, shape and content."""
    import torch

    if file is None or file.strided or file.unreadable or file.ignored:  # torch hashes keys, for hours if they are so made
        return None
    try:
        theirs = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:
        return None
    inside = theirs[file.inside] if file.inside else theirs
    for tensor in file.header.tensors:
        other = inside.get(tensor.name) if isinstance(inside, dict) else None
        if isinstance(other, torch.Tensor) and tensor.dtype != "F4":
            raw = other.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if other.numel() else b""
            if (tuple(other.shape), raw) != (tensor.shape, data[tensor.start : tensor.stop]):
                return f"torch reads another tensor {tensor.name[:40]!r}"
    return None


def pickle(place: Path) -> Target:
    """The pickle of a torch file that is sound but for it."""
    from tests.crafted import torch_file

    from triptych.formats import torch_zip

    held = Held(place / "a.bin")

    def whole(data: bytes) -> bytes:
        return torch_file(data, whole=False)

    def agree(data: bytes, file: Any, error: Exception | None) -> str | None:
        return _same_as_torch(whole(data), file, error)

    def read(data: bytes) -> object:
        file = torch_zip.read(held.put(whole(data)))
        return file if file.notes is not None else None

    return Target(list(programs()), read, (3, 4), agree, OPCODES)


def torch(place: Path) -> Target:
    """A whole torch file: the zip archive."""
    from triptych.formats import torch_zip

    held = Held(place / "a.bin")
    words = (r"PK\x01\x02", r"PK\x03\x04", r"PK\x05\x06", r"PK\x06\x06", r"PK\x06\x07", r"\xff\xff\xff\xff", r"\xff\xff", "a/data.pkl",
             "a/data/0", "a/byteorder", "little")  # fmt: skip
    return Target([*cases("torch"), good()["a.bin"]], lambda data: torch_zip.read(held.put(data)), (3, 4), _same_as_torch, words)


def gguf(place: Path) -> Target:
    from gguf import GGUFReader

    from triptych.formats import gguf as ours

    held = Held(place / "a.gguf")

    def read(data: bytes) -> object:
        found = ours.read(held.put(data))
        return found, ours.config_of(found), found.gaps

    def agree(data: bytes, found: Any, error: Exception | None) -> str | None:
        if found is None:
            return None
        mine = [(tensor.name, tensor.start, tensor.size) for tensor in found[0].header.tensors]
        try:
            reader = GGUFReader(held.path)
        except Exception:
            return None
        theirs = [(tensor.name, int(tensor.data_offset), int(tensor.n_bytes)) for tensor in reader.tensors]
        return None if sorted(mine) == sorted(theirs) else f"gguf reads {theirs[:3]}, we {mine[:3]}"

    words = ("GGUF", "general.alignment", "general.architecture", r"\x09\x00\x00\x00", r"\x08\x00\x00\x00",
             r"\xff\xff\xff\xff\xff\xff\xff\xff", r"\x20\x00\x00\x00")  # fmt: skip
    return Target([*cases("gguf"), good()["a.gguf"]], read, (3, 4), agree, words)


def certificate(place: Path) -> Target:
    """The certificate of a small conversion, checked against its output."""
    from tests.crafted import config as make
    from tests.crafted import neox

    from triptych import convert
    from triptych.certificate import certify, check_certificate

    (place / "in").mkdir()
    make(neox())(place / "in")
    convert(place / "in", place / "out", "split")
    made = certify(place / "in", place / "out").to_dict()
    held = Held(place / "certificate.json")
    keys = {key for table in (made, made["source"], made["projections"][0]["source"]) for key in table} | {"dtype", "shape", "sha256"}
    words = [f'"{key}":' for key in sorted(keys)] + ["[]", "{}", "null", "-1", "9223372036854775807", '"h (q|k|v) d"', "1e9", "true"]

    def read(data: bytes) -> object:
        return check_certificate(held.put(data), place / "out")

    return Target([json.dumps(made, separators=(",", ":")).encode()], read, (1, 3), words=words)


TARGETS: dict[str, Callable[[Path], Target]] = {
    made.__name__: made for made in (layout, formula, records, safetensors, index, pickle, torch, gguf, sizes, certificate, config, stamp)
}
