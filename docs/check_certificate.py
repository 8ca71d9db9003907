"""python check_certificate.py CERTIFICATE OUT [SOURCE]: checks what `triptych verify` certified, without triptych. OUT: folder or file."""

# fmt: off
import functools, hashlib, json, math, pathlib, re, sys, numpy as np  # noqa: E401, I001
def branches(words, size):  # the rows between two brackets of a layout, in order: (names, [(axis, index), ...])
    out, end = [], "|"
    while end == "|":
        some = [([{name} - {"_"} for name in words.pop(0).split("=")], [])]
        while words[0] not in ("|", ")"):
            inner = branches(words, size) if (word := words.pop(0)) == "(" else [([set()], [(word, i)]) for i in range(size[word])]
            some = [([x | y for x in a for y in b], at + more) for a, at in some for b, more in inner]
        out, end = out + some, words.pop(0)
    return out
@functools.cache
def rows(layouts, sizes):  # of tensors that lie so, one after the other: {(part, head, dim): row}, the rows declared zero, how many of each
    size, places, zeros, counts = dict(sizes), {}, {}, []
    for words in (re.findall(r"[\w=]+|[()|]", text) for text in layouts):
        bare = any(words[:i].count("(") == words[:i].count(")") for i, word in enumerate(words) if word == "|")
        for row, (names, at) in enumerate(every := branches([*([] if bare else ["_"]), *words, ")"], size), sum(counts)):
            heads = sorted((a for a, _ in at if a in "tmghnr" and (a != "n" or not {"h", "g"} & {*dict(at)})), key="tmghnr".index)
            dims = re.sub(r"\bp (.*)\bc ", r"c \1p ", "".join(f"{a} " for a, _ in at if a not in heads)).split()  # c counts before p
            head, dim = (functools.reduce(lambda n, a, at=dict(at): n * size[a] + at[a], axes, 0) for axes in (heads, dims))
            (zeros if any("0" in name for name in names) else places).update({(frozenset(name), head, dim): row for name in names})
        counts += [len(every)]
    return places, [*zeros.values()], counts
def read(path):  # {tensor: its bytes}, what a certificate tells of them, the stamps and plans
    data, told, stamps, plans, where = {}, {}, {}, set(), {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        start = 8 + int.from_bytes((raw := np.memmap(file, np.uint8, "r"))[:8].tobytes(), "little")
        stamp = json.loads((header := json.loads(raw[8:start].tobytes())).pop("__metadata__", {}).get("triptych", "{}"))
        stamps, plans = stamps | stamp.get("layouts", {}), plans | {stamp["plan"]} if stamp else plans
        for name, entry in header.items():
            assert where.setdefault(name, file.name) == file.name, f"{name} stands twice"
            data[name] = raw[start:][slice(*entry["data_offsets"])]
            told[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "sha256": hashlib.sha256(data[name]).hexdigest()}
    assert all(json.loads(i.read_text())["weight_map"] == where for i in path.glob("*.index.json")), "the index is not that of the files"
    return data, told, [stamps, sorted(plans)]
def check(path, out, source=None):
    cert, (data, told, stamps) = json.loads(pathlib.Path(path).read_text()), read(pathlib.Path(out))
    sides = [cert["source"]["tensors"], cert["output"]["tensors"]]
    assert told == sides[1], "not as certified: " + ", ".join(name for name in {**told, **sides[1]} if told.get(name) != sides[1].get(name))
    assert stamps == [cert["stamps"], cert["plan"]], "the stamps are not the certified ones"
    assert source is None or read(pathlib.Path(source))[1] == sides[0], "the input is not the certified one"
    for both in ([one["source"], one["output"]] for one in cert["projections"]):
        names, (axis, packed) = [[*side["tensors"]] for side in both], [side["axis"] for side in both]
        kinds = [[known.pop(name) for name in some] for known, some in zip(sides, names, strict=True)]
        (old, _, counts), (new, zeros, after) = (rows(tuple(side["tensors"].values()), tuple(side["sizes"].items())) for side in both)
        every = [(k["shape"][a], k["dtype"], [*np.delete(k["shape"], a)]) for ks, a in zip(kinds, (axis, packed), strict=True) for k in ks]
        assert every == [(n, *every[0][1:]) for n in [*counts, *after]], f"{names}: other dtypes or shapes"
        turned = [data[name].reshape(*k["shape"], -1).swapaxes(axis, packed) for name, k in zip(names[1], kinds[1], strict=True)]
        table = np.concatenate([part.reshape(math.prod(kinds[0][0]["shape"][:axis]), part.shape[axis], -1) for part in turned], 1)
        back, into, of = np.zeros((len(table), sum(counts), table.shape[2]), np.uint8), [*old.values()], [new.get(k, -1) for k in old]
        assert sorted({*of, *zeros}) == [*range(sum(after))] and not table[:, zeros].any(), f"{names}: not the same rows"
        back[:, into] = table[:, of]
        assert (back[:, into] == table[:, of]).all(), f"{names}: rows that are one in the input differ"
        for name, kind, part in zip(names[0], kinds[0], np.split(back, np.cumsum(counts)[:-1], 1), strict=True):
            assert hashlib.sha256(part.copy()).hexdigest() == kind["sha256"], f"{names[1]} do not hold the rows of {name} in this order"
    assert sides[0] == sides[1], "the other tensors of input and output differ"
    return f"{len(told)} tensors are as certified, and {len(cert['projections'])} projections hold the input's rows in the stated order"
if __name__ == "__main__": print(check(*sys.argv[1:]))  # noqa: E701
