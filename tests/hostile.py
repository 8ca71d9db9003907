"""Files made to break a reader: every one with the error that it must give. Small where it can be; the large ones are sparse or flat."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .crafted import (
    Part,
    archive,
    bomb,
    config,
    crowd,
    entry,
    gguf_file,
    index,
    info,
    item,
    linked,
    neox,
    one,
    overlapping,
    piped,
    plain_zip,
    safetensors_file,
    sparse,
    sparse_torch,
    string,
    table,
    tar,
    tensor,
    text,
    torch_file,
)  # fmt: skip

UNREADABLE, REFUSED = ("FormatError", 3), ("PlanError", 4)
GIGA = 1 << 30


class Case(NamedTuple):
    """`make` fills an empty folder and returns what is to be read, by the reader for `kind`; `what` stands in the error's headline."""

    name: str
    kind: str
    make: Callable[[Path], Path]
    expected: tuple[str, int]
    what: str


def _safetensors() -> Iterable[tuple[str, Callable[[Path], Path], tuple[str, int], str]]:
    def file(table: object, data: bytes = b"", **more: Any) -> Callable[[Path], Path]:
        return one("a.safetensors", safetensors_file(table, data, **more))

    bad = UNREADABLE
    yield "empty file", one("a.safetensors", b""), bad, "the file is empty"
    yield "seven bytes", one("a.safetensors", bytes(7)), bad, "not a safetensors file"
    yield "a header of 2^63 bytes", file({}, length=1 << 63), bad, "too long"
    yield "a header of 2^64 - 1 bytes", file({}, length=(1 << 64) - 1), bad, "too long"
    yield "a header longer than the file", file({}, length=99), bad, "longer than the file"
    yield "a header of 99 MB of zeros", sparse("a.safetensors", struct.pack("<Q", 99_000_000), 99_000_100), bad, "no table"
    yield "a header of 99 MB of lists", lambda folder: file(b'{"a":[' + b"[]," * 33_000_000)(folder), bad, "holds too much"
    yield "a header over the limit, file large enough", sparse("a.safetensors", struct.pack("<Q", 100_000_001), GIGA), bad, "too long"
    yield "deep lists", file(b'{"a":' + b"[" * 200_000), bad, "nested too deeply"
    yield "deep tables", file(b'{"a":' * 100_000), bad, "nested too deeply"
    yield "no JSON", file(b"\x80\x02}q\x00."), bad, "JSON"
    yield "JSON of a list", file([1]), bad, "no table"
    yield "not a number", file(b'{"a":NaN}'), bad, "JSON"
    yield "a number of 10,000 digits", file(b'{"a":' + b"9" * 10_000 + b"}"), bad, "JSON"
    yield "one name twice", file(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 1)).encode(),) * 2), b"x"), bad, "JSON"
    yield "one key of an entry twice", file(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), bad, "JSON"
    yield "a half surrogate as a name", file(b'{"\\ud800":%b}' % json.dumps(entry(0, 1)).encode(), b"x"), bad, "malformed"
    yield "no UTF-8", file(b'{"\xff":1}'), bad, "JSON"
    yield "overlap", file({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), bad, "overlap"
    yield "the same bytes twice", file({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), bad, "overlap"
    yield "a hole", file({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)), bad, "hole"
    yield "a hole at the begin", file({"a": entry(2, 4)}, bytes(4)), bad, "hole"
    yield "bytes behind the last tensor", file({"a": entry(0, 4)}, bytes(5)), bad, "behind"
    yield "data cut short", file({"a": entry(0, 4)}, bytes(3)), bad, "cut short"
    yield "a terabyte claimed", file({"a": entry(0, 1 << 40)}, bytes(3)), bad, "cut short"
    yield "offsets below zero", file({"a": entry(-4, 0, shape=[4])}), bad, "natural"
    yield "offsets in the wrong order", file({"a": entry(4, 0, shape=[4])}, bytes(4)), bad, "fit"
    yield "an offset of 2^63", file({"a": entry(1 << 63, (1 << 63) + 1, shape=[1])}), bad, "natural"
    yield "an offset that is a float", file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1.0]}}, b"x"), bad, "natural"
    yield "an offset that is true", file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, True]}}, b"x"), bad, "natural"
    yield "three offsets", file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"x"), bad, "malformed"
    yield "a shape whose product wraps to zero", file({"a": entry(0, 0, shape=[1 << 32, 1 << 32])}), bad, "fit"
    yield "an empty shape whose product overflows", file({"a": entry(0, 0, shape=[1 << 62, 1 << 62, 0])}), bad, "too large"
    yield "a shape below zero", file({"a": entry(0, 4, shape=[-2, -2])}, bytes(4)), bad, "natural"
    yield "a shape of 1,000 axes", file({"a": entry(0, 1, shape=[1] * 1000)}, b"x"), bad, "shape"
    yield "a shape that is a text", file({"a": entry(0, 1, shape="1")}, b"x"), bad, "shape"
    yield "an unknown dtype", file({"a": entry(0, 1, "F7")}, b"x"), bad, "dtype"
    yield "a dtype that is a list", file({"a": entry(0, 1, [])}, b"x"), bad, "dtype"
    yield "an entry that is a text", file({"a": "dtype"}), bad, "malformed"
    yield "metadata that are no texts", file({"__metadata__": {"a": 1}}), bad, "texts"
    yield "a stamp that is no JSON", file({"__metadata__": {"triptych": "{"}}), bad, "JSON"
    yield "a stamp nested deeply", file({"__metadata__": {"triptych": "[" * 100_000}}), bad, "nested too deeply"
    yield "a stamp that names another tensor", file({"__metadata__": {"triptych": '{"version":1,"layouts":{"x":{}}}'}}), bad, "not there"
    for what, told in (("more rows", {"axis": 0, "sizes": {"h": 3, "d": 1}}), ("no such axis", {"axis": 1, "sizes": {"h": 2, "d": 1}})):
        stamp = json.dumps({"version": 1, "layouts": {"a": {"layout": "h (q|k|v) d", **told}}})
        yield f"a stamp of {what}", file({"__metadata__": {"triptych": stamp}, "a": entry(0, 6)}, bytes(6)), bad, "stamp does not fit"
    for what, words in (
        ("many brackets", [f"(p{i})" for i in range(400)]),
        ("names by the billion", [f"(a{i}=b{i})" for i in range(300)]),
        ("many axes", [f"x{i}" for i in range(800)]),
    ):
        stamp = json.dumps({"version": 1, "layouts": {"a": {"layout": " ".join(words), "axis": 0, "sizes": {}}}})
        yield f"a stamp with {what}", file({"__metadata__": {"triptych": stamp}, "a": entry(0, 6)}, bytes(6)), bad, "stamp is damaged"
    yield "a device", linked("a.safetensors", "/dev/zero"), bad, "regular file"
    yield "a pipe", piped("a.safetensors"), bad, "regular file"
    yield "a link to itself", linked("a.safetensors", "a.safetensors"), bad, "no such file"
    yield "a link to nothing", linked("a.safetensors", "nothing"), bad, "no such file"


def _folder() -> Iterable[tuple[str, Callable[[Path], Path], tuple[str, int], str]]:
    bad = UNREADABLE
    for name in (
        "../a",
        "..",
        "/etc/passwd",
        "a/b",
        "..\\a",
        "a\\b",
        "C:a",
        "C:\\a",
        "//host/a",
        "",
        "a\0b",
        "a\x1b[31mb",
        "a" * 300,
        "a\nb",
    ):
        yield f"index: shard {name[:20]!r}", index({"w": name}), bad, "outside its folder"
    yield "index: shard is a number", index({"w": 1}), bad, "outside its folder"
    yield "index: no weight_map", index(b'{"metadata":{}}'), bad, "not an index"
    yield "index: weight_map is a list", index([["w", "x"]]), bad, "not an index"
    yield "index: deep", index(b'{"weight_map":' * 100_000), bad, "nested too deeply"
    yield "index: one tensor twice", index(b'{"weight_map":{"w":"model1.safetensors","w":"x"}}'), bad, "JSON"
    yield "index: a shard is not there", index({"w": "model2.safetensors"}), bad, "are missing"
    yield "index: a tensor is not in its shard", index({"w": "model1.safetensors", "v": "model1.safetensors"}), bad, "disagree"
    yield "index: itself as a shard", index({"w": "model.safetensors.index.json"}), bad, "safetensors file|header"
    yield "index: 300 MB", linked("x", "x", sparse("model.safetensors.index.json", b"", 300 << 20)), bad, "checkpoint|too large"
    yield "a pipe beside the weights", piped("p", index({"w": "model1.safetensors"})), bad, "regular file"
    yield "a loop beside the weights", linked("x", "x", index({"w": "model1.safetensors"})), bad, "cannot be read"
    yield "a shard that links to a device", linked("m.safetensors", "/dev/zero", index({"w": "m.safetensors"})), bad, "regular file"


def _config() -> Iterable[tuple[str, Callable[[Path], Path], tuple[str, int], str]]:
    bad = UNREADABLE
    yield "config: no JSON", config(b"{"), bad, "JSON"
    yield "config: a list", config([]), bad, "no table"
    yield "config: deep", config(b'{"a":' * 100_000), bad, "nested too deeply"
    yield "config: one key twice", config(b'{"model_type":"gpt2","model_type":"bert"}'), bad, "JSON"
    yield "config: not a number", config(b'{"hidden_size":Infinity}'), bad, "JSON"
    yield "config: a number of 10,000 digits", config(b'{"hidden_size":' + b"1" * 10_000 + b"}"), bad, "JSON"


def _plan() -> Iterable[tuple[str, Callable[[Path], Path], tuple[str, int], str]]:
    table = {
        "num_attention_heads": (0, -1, 5, 1 << 63, 1.5, "2", [2], {}, True, 1e308, "9" * 5000, [[]]),
        "hidden_size": (0, -4, 1 << 70, "x", [4], {"a": 4}),
        "model_type": ([], {}, 1, None, "gpt_neox\0", "../x", "x" * 100_000),
    }
    for key, values in table.items():
        for value in values:
            yield f"config: {key} = {json.dumps(value)[:24]}", config(neox(**{key: value})), REFUSED, "not known"
    yield "config: a sub-config 500 deep", config(_nested(500)), REFUSED, "not known"


def _nested(depth: int) -> dict[str, object]:
    inner: dict[str, object] = neox()
    for _ in range(depth):
        inner = {"model_type": "x", "text_config": inner}
    return inner


def _torch() -> Iterable[tuple[str, Callable[[Path], Path], tuple[str, int], str]]:
    bad, no = UNREADABLE, REFUSED

    def pickled(value: bytes, **options: Any) -> Callable[[Path], Path]:
        return one("a.bin", torch_file(value, **options))

    def program(raw: bytes) -> Callable[[Path], Path]:
        return one("a.bin", torch_file(raw, whole=False))

    def large(value: Callable[[], bytes]) -> Callable[[Path], Path]:
        return one("a.bin", lambda: torch_file(value()))

    def zipped(**options: Any) -> Callable[[Path], Path]:
        return one("a.bin", torch_file(table(w=tensor()), **options))

    shell = text("echo pwned > pwned")
    code = "asks to run code"
    yield "pickle: os.system", pickled(table(w=b"cos\nsystem\n(" + shell + b"tR")), no, code
    yield "pickle: posix.system at the top", pickled(b"cposix\nsystem\n(" + shell + b"tR"), no, code
    yield "pickle: posix.system by two texts", pickled(table(w=text("posix") + text("system") + b"\x93(" + shell + b"tR")), no, code
    yield "pickle: builtins.eval", pickled(table(w=b"cbuiltins\neval\n(" + text("1/0") + b"tR")), no, code
    yield "pickle: __builtin__.exec", pickled(table(w=b"c__builtin__\nexec\n(" + text("1/0") + b"tR")), no, code
    yield "pickle: an import", pickled(table(w=b"cbuiltins\n__import__\n(" + text("antigravity") + b"tR")), no, code
    yield "pickle: subprocess as an object", pickled(table(w=b"csubprocess\nPopen\n(" + shell + b"t\x81")), no, code
    yield "pickle: an import without a call", pickled(table(w=b"cos.path\njoin\n")), no, code
    yield "pickle: torch.load", pickled(table(w=b"ctorch\nload\n(" + text("/etc/passwd") + b"tR")), no, code
    yield "pickle: a call beside a good tensor", pickled(table(v=tensor(), w=b"cos\nsystem\n(" + shell + b"tR")), no, code
    yield "pickle: code in ignored objects", pickled(table(w=b"cargparse\nNamespace\n)\x81}(" + text("x") + b"csys\nexit\n)Rub")), no, code
    yield "pickle: a call of a call", pickled(table(w=b"cfunctools\npartial\n(" + text("x") + b"tR)R")), bad, "damaged"
    yield "pickle: a tensor by another function", pickled(table(w=b"ctorch._utils\n_rebuild_evil\n)R")), no, "without running code"
    yield "pickle: code in place of the root", pickled(b"cevil\nrun\n(" + shell + b"tR"), no, "table of tensors"
    yield "pickle: INST", program(b"(" + shell + b"ios\nsystem\n."), bad, "not read"
    yield "pickle: OBJ", program(b"\x80\x02(cevil\nrun\n" + shell + b"o."), bad, "not read"
    yield "pickle: a registered extension", program(b"\x80\x02\x82\x01."), bad, "not read"
    yield "pickle: an id in text", program(b"\x80\x02P0\n."), bad, "not read"
    yield "pickle: protocol 0", program(b"(dp0\nS'a'\np1\nI1\ns."), bad, "not read"
    yield "pickle: protocol 255", program(b"\x80\xff}."), bad, "protocol"
    yield "pickle: empty", program(b""), bad, "damaged"
    yield "pickle: no end", program(b"\x80\x02}"), bad, "damaged"
    yield "pickle: two values", program(b"\x80\x02}}."), bad, "damaged"
    yield "pickle: bytes behind its end", program(b"\x80\x02}.}"), bad, "damaged"
    yield "pickle: nothing on the stack", program(b"\x80\x020."), bad, "damaged"
    yield "pickle: no mark", program(b"\x80\x02u."), bad, "damaged"
    yield "pickle: an odd table", pickled(b"}(" + text("w") + b"u"), bad, "damaged"
    yield "pickle: items for a number", pickled(b"K\1(K\2e"), bad, "damaged"
    yield "pickle: an unknown memo", pickled(b"h\x07"), bad, "damaged"
    yield "pickle: memo number 2^32 - 1", pickled(b"K\1r\xff\xff\xff\xff"), no, "table of tensors"
    yield "pickle: a text of 2^32 - 1 bytes", program(b"\x80\x02X\xff\xff\xff\xff."), bad, "damaged"
    yield "pickle: a text of 2^63 bytes", program(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b"."), bad, "damaged"
    yield "pickle: bytes of 2^64 - 1", program(b"\x80\x05\x96" + b"\xff" * 8 + b"."), bad, "damaged"
    yield "pickle: a number of 2^31 bytes", program(b"\x80\x02\x8b" + struct.pack("<I", 1 << 31) + b"."), bad, "too long"
    yield "pickle: a text that is no UTF-8", pickled(b"X\1\0\0\0\xff"), bad, "damaged"
    yield "pickle: a name without an end", program(b"\x80\x02c" + b"a" * 100_000), bad, "damaged"
    yield "pickle: a name of control characters", pickled(b"ctorch\n\x1b[31m\n"), bad, "damaged"
    yield "pickle: flood of lists", large(lambda: b"]" * 3_000_000 + b"0" * 2_999_999), bad, "too long"
    yield "pickle: flood of marks", large(lambda: b"(" * 3_000_000), bad, "too long"
    yield "pickle: flood of memos", large(lambda: b"".join(b"]r" + struct.pack("<I", i) for i in range(600_000))), bad, "too long"
    yield "pickle: deep lists", large(lambda: b"]" * 200_000 + b"a" * 199_999), no, "table of tensors"
    yield "pickle: deep calls", large(lambda: b"ca\nb\n" * 50_000 + b")R" + b"\x85R" * 49_999), no, "table of tensors"
    doubling = b"q\0" + b"0" + table(a=b"h\0", b=b"h\0")
    yield "pickle: doubled forty times", pickled(table(w=tensor()) + doubling * 40), bad, "too deeply"
    yield "pickle: doubled twenty times", pickled(table(w=tensor()) + doubling * 20), bad, "too much"
    yield "pickle: doubled thirteen times", pickled(table(w=tensor()) + doubling * 13), bad, "too much"
    yield "pickle: keys doubled sixty times", pickled(b"}(K\1" + b"q\0h\0\x86" * 60 + tensor() + b"u"), no, "without running code"
    pairs = b"ccollections\nOrderedDict\nq\0](" + b"K\1K\2\x86" * 100_000 + b"e\x85q\1"
    yield "pickle: pairs copied again and again", large(lambda: pairs + b"h\0h\1R0" * 100_000), bad, "too long"
    hundred = b"}(" + b"".join(text(str(i)) + tensor() for i in range(100)) + b"u"
    yield "pickle: a long name a hundred times", large(lambda: b"}(" + text("x" * 1_000_000) + hundred + b"u"), bad, "too much"
    yield "pickle: 34 MB", sparse_torch(34_000_000), bad, "too large"
    yield "pickle: a table that holds itself", pickled(b"}q\0(" + text("w") + tensor() + text("x") + b"h\0u"), bad, "too deeply"
    yield "tensor: beyond its storage", pickled(table(w=tensor(offset=1))), bad, "lie in its storage"
    yield "tensor: strides beyond its storage", pickled(table(w=tensor(strides=(4, 1)))), bad, "lie in its storage"
    yield "tensor: an offset below zero", pickled(table(w=tensor(offset=-1))), bad, "makes no sense"
    yield "tensor: a stride below zero", pickled(table(w=tensor(strides=(3, -1)))), bad, "makes no sense"
    yield "tensor: a shape of 2^62 and 2^62", pickled(table(w=tensor(shape=(1 << 62, 1 << 62), strides=(0, 0)))), no, "without running code"
    yield "tensor: 2^63 numbers stored", pickled(table(w=tensor(numel=1 << 63))), bad, "makes no sense"
    yield "tensor: fewer numbers stored", pickled(table(w=tensor(numel=5))), bad, "another size"
    yield "tensor: shape without strides", pickled(table(w=tensor(strides=()))), bad, "makes no sense"
    yield "tensor: 65 axes", pickled(table(w=tensor(shape=(1,) * 65, strides=(1,) * 65))), bad, "makes no sense"
    yield "tensor: a storage outside", pickled(table(w=tensor(key="../../../etc/passwd"))), bad, "not in the archive"
    yield "tensor: a storage by an absolute name", pickled(table(w=tensor(key="/etc/passwd"))), bad, "not in the archive"
    yield "tensor: no arguments", pickled(table(w=b"ctorch._utils\n_rebuild_tensor_v2\n)R")), bad, "makes no sense"
    yield "tensor: no storage", pickled(table(w=b"ctorch._utils\n_rebuild_tensor_v2\n(K\1K\2))NNtR")), bad, "makes no sense"
    yield "tensor: a parameter of a number", pickled(table(w=b"ctorch._utils\n_rebuild_parameter\n(K\1K\2NtR")), bad, "makes no sense"
    yield "tensor: NUL in its name", pickled(b"}(" + text("a\0b") + tensor() + b"u"), bad, "printed"
    yield "tensor: escape sequence in its name", pickled(b"}(" + text("a\x1b]0;b\x07") + tensor() + b"u"), bad, "printed"
    yield "zip: no end", one("a.bin", torch_file(table(w=tensor()))[:-22]), bad, "no end"
    yield "zip: bytes behind the end", one("a.bin", torch_file(table(w=tensor())) + b"x"), bad, "no end"
    yield "zip: a comment", zipped(comment=b"hello"), bad, "no end"
    yield "zip: a comment that is another end", zipped(comment=b"PK\5\6" + bytes(18)), bad, "not a torch file"
    yield "zip: directory beyond the file", zipped(directory_at=1 << 31), bad, "outside the file"
    yield "zip: directory elsewhere", zipped(directory_at=0), bad, "damaged|cut short"
    yield "zip: 60,000 records promised", zipped(count=60_000), bad, "damaged"
    yield "zip: 64-bit end nowhere", zipped(wide=True, locator_at=1 << 62), bad, "64-bit"
    yield "zip: 64-bit directory at 2^63", zipped(wide=True, directory_at=1 << 63), bad, "outside the file"
    yield "zip: a storage of 2^63 bytes", zipped(wide=True, more={b"a/data/0": Part(bytes(24), size=1 << 63)}), bad, "end where it should"
    yield "zip: a record at 2^63", zipped(wide=True, more={b"a/data/0": Part(bytes(24), header=1 << 63)}), bad, "no record|cannot"
    yield "zip: a record that is another", zipped(more={b"a/data/0": Part(bytes(24), header=0)}), bad, "no record"
    yield "zip: a record under two names", zipped(more={b"a/data/0": Part(bytes(24), local_name=b"a/data/1")}), bad, "no record"
    yield "zip: one name twice", one("a.bin", archive([(b"a/data.pkl", b"\x80\x02}."), (b"a/data.pkl", b"\x80\x02].")])), bad, "twice"
    yield "zip: two pickles", zipped(more={b"b/data.pkl": b"\x80\x02}."}), bad, "not a torch file"
    yield "zip: no pickle", one("a.bin", archive({b"a/data/0": b""})), bad, "not a torch file"
    yield "zip: empty archive", one("a.bin", archive({})), bad, "not a torch file"
    yield "zip: an encrypted storage", zipped(more={b"a/data/0": Part(bytes(24), flags=1)}), no, "encrypted"
    yield "zip: a storage that is a folder", zipped(more={b"a/data/0": Part(bytes(24), attributes=0x10)}), no, "folder"
    yield "zip: a pickle that unpacks to a thousand times its size", one("a.bin", bomb), no, "compressed"
    yield "zip: overlapping storages", one("a.bin", overlapping), bad, "overlap"
    yield "zip: a directory of 20 MB", one("a.bin", crowd), bad, "too long"
    yield "zip: a spreadsheet", one("a.bin", plain_zip), bad, "not a torch file"
    yield "torch: empty file", one("a.bin", b""), bad, "not a torch file"
    yield "torch: legacy", one("a.bin", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."), no, "before version 1.6"
    yield "torch: bare pickle of os.system", one("a.bin", b"\x80\x02cos\nsystem\n(" + shell + b"tR."), no, "bare pickle"
    yield "torch: tar", one("a.bin", tar), bad, "not a torch file"
    yield "torch: a pointer to large storage", one("a.bin", b"version https://git-lfs.github.com/spec/v1\n"), bad, "not a torch file"
    yield "torch: big-endian", zipped(more={b"a/byteorder": b"big"}), no, "big-endian"
    yield "torch: byte order of 65 bytes", zipped(more={b"a/byteorder": b"x" * 65}), bad, "too large"
    yield "torch: unknown byte order", zipped(more={b"a/byteorder": b"\x1b[31m"}), bad, "byte order"
    yield "torch: version 99", zipped(more={b"a/version": b"99"}), no, "version"
    yield "torch: a device", linked("a.bin", "/dev/zero"), bad, "regular file"


def _gguf() -> Iterable[tuple[str, Callable[[Path], Path], tuple[str, int], str]]:
    bad, no = UNREADABLE, REFUSED

    def file(*items: bytes, infos: Iterable[bytes] | None = None, data: bytes = bytes(128), **more: Any) -> Callable[[Path], Path]:
        return one("a.gguf", gguf_file(items, infos, data, **more))

    def listed(kind: int, count: int, content: bytes = b"") -> bytes:
        return item(b"k", 9, struct.pack("<IQ", kind, count) + content)

    huge = 1 << 63
    yield "gguf: empty file", one("a.gguf", b""), bad, "not a GGUF file"
    yield "gguf: another magic", one("a.gguf", b"GGML" + bytes(40)), bad, "not a GGUF file"
    for version in (0, 1, 4, 99):
        yield f"gguf: version {version}", file(version=version), no, "version"
    yield "gguf: big-endian", file(version=3 << 24), no, "big-endian"
    yield "gguf: 2^60 tensors", file(tensors=1 << 60), bad, "too many tensors"
    yield "gguf: one tensor more", file(tensors=2, data=b""), bad, "overlap"
    yield "gguf: 2^60 entries", file(entries=1 << 60), bad, "too many metadata"
    yield "gguf: a key of 2^63 bytes", file(string(b"", huge) + bytes(12)), bad, "too many bytes"
    yield "gguf: a key of 2^64 - 1 bytes", file(string(b"", (1 << 64) - 1) + bytes(12)), bad, "too many bytes"
    yield "gguf: a text of 2^63 bytes", file(item(b"k", 8, string(b"", huge))), bad, "too many bytes"
    yield "gguf: a list of 2^60 numbers", file(listed(4, 1 << 60)), bad, "too many items"
    yield "gguf: a list of 2^64 - 1 texts", file(listed(8, (1 << 64) - 1)), bad, "too many items"
    yield "gguf: a list of texts that jump away", file(listed(8, 5000, string(b"", huge) + bytes(40_000))), bad, "cut short"
    deep = struct.pack("<IQ", 9, 1) * 1000 + struct.pack("<IQ", 4, 0)
    yield "gguf: lists in lists, 1,000 deep", file(item(b"k", 9, deep)), bad, "too deeply"
    yield "gguf: 200,000 lists in a list", file(listed(9, 200_000, struct.pack("<IQ", 4, 0) * 200_000)), bad, "too many items"
    yield "gguf: 3,000,000 empty texts", one("a.gguf", lambda: gguf_file([listed(8, 3_000_000, bytes(24_000_000))])), bad, "too many items"
    bytes_4000 = struct.pack("<IQ", 0, 4000) + bytes(4000)
    many = one("a.gguf", lambda: gguf_file(item(b"%d" % i, 9, bytes_4000) for i in range(4000)))
    yield "gguf: 4,000 lists of 4,000 numbers", many, bad, "too many items"
    yield "gguf: a list of an unknown type", file(listed(77, 1, bytes(8))), bad, "unknown type"
    yield "gguf: a value of an unknown type", file(item(b"k", 13, bytes(8))), bad, "unknown type"
    yield "gguf: a truth value of 7", file(item(b"k", 7, b"\7")), bad, "neither 0 nor 1"
    yield "gguf: one key twice", file(item(b"k", 0, b"\1"), item(b"k", 0, b"\2")), bad, "twice"
    yield "gguf: a key that is no UTF-8", file(item(b"\xff", 0, b"\1")), bad, "UTF-8"
    yield "gguf: escape sequence in a key", file(item(b"\x1b[2J", 0, b"\1")), bad, "printed"
    for value in (0, 3, 33, (1 << 32) - 1):
        yield f"gguf: alignment {value}", file(item(b"general.alignment", 4, struct.pack("<I", value))), bad, "power of two"
    yield "gguf: alignment 2^31", file(item(b"general.alignment", 4, struct.pack("<I", 1 << 31))), bad, "cut short"
    yield "gguf: alignment as a text", file(item(b"general.alignment", 8, string(b"32"))), bad, "power of two"
    yield "gguf: alignment as a long number", file(item(b"general.alignment", 10, struct.pack("<Q", 32))), bad, "power of two"
    yield "gguf: one name twice", file(infos=[info(), info(offset=128)], data=bytes(256)), bad, "one name"
    yield "gguf: a name of 2^63 bytes", file(infos=[string(b"", huge) + bytes(40)]), bad, "too many bytes"
    yield "gguf: NUL in a name", file(infos=[info(b"a\0b")]), bad, "printed"
    yield "gguf: a name that is no UTF-8", file(infos=[info(b"\xc3(")]), bad, "UTF-8"
    yield "gguf: five dims", file(infos=[info(dims=(1, 1, 1, 1, 32))]), bad, "too many dims"
    yield "gguf: 2^32 - 1 dims", file(infos=[info(count=(1 << 32) - 1)]), bad, "too many dims"
    yield "gguf: a dim of 0", file(infos=[info(dims=(0, 4))], data=b""), bad, "positive"
    yield "gguf: a dim of -1", file(infos=[info(dims=((1 << 64) - 1, 4))]), bad, "positive"
    yield "gguf: dims whose product wraps to zero", file(infos=[info(dims=(1 << 32, 1 << 32))]), bad, "larger than any file"
    yield "gguf: an unknown tensor type", file(infos=[info(kind=4)]), bad, "unknown tensor type"
    yield "gguf: a tensor type of 2^32 - 1", file(infos=[info(kind=(1 << 32) - 1)]), bad, "unknown tensor type"
    yield "gguf: rows that do not fill blocks", file(infos=[info(dims=(8, 4), kind=2)]), bad, "whole blocks"
    yield "gguf: an offset that is not aligned", file(infos=[info(offset=8)], data=bytes(160)), bad, "not aligned|hole|overlap"
    yield "gguf: an offset of 2^63", file(infos=[info(offset=huge)]), bad, "larger than any file"
    yield "gguf: a hole", file(infos=[info(offset=64)], data=bytes(192)), bad, "hole"
    yield "gguf: overlap", file(infos=[info(), info(b"v", offset=64)], data=bytes(192)), bad, "overlap"
    yield "gguf: data cut short", file(data=bytes(127)), bad, "cut short"
    yield "gguf: bytes behind the last tensor", file(data=bytes(128 + 32)), bad, "behind"
    yield "gguf: a pipe", piped("a.gguf"), bad, "regular file"


CASES: tuple[Case, ...] = tuple(
    Case(name, kind, make, expected, what)
    for kind, cases in (
        ("safetensors", _safetensors),
        ("folder", _folder),
        ("folder", _config),
        ("plan", _plan),
        ("torch", _torch),
        ("gguf", _gguf),
    )
    for name, make, expected, what in cases()
)
