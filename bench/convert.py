"""Converting a checkpoint against copying it: `cp` and ours with one and two workers; `--peers` adds what is done today.

    python bench/convert.py [--layers N] [--rounds N] [--to LAYOUT] [--no-sync] [--peers] [--llama-cpp PATH]
                            [--format bin|gguf] [--ranks N] [--turned] [--rope]

Input: GPT-NeoX-shaped, bf16, in three shards under .bench/, made on the first run (24 layers are 2.8 GB). Every round begins with a copy
that is not counted, and runs all ways in a new order, peers last. Before each run the input is read, then the output of the last one is
removed, and the disk brought to rest. A ratio is one way's time over that of `cp` in the same round, because absolute times drift. What is
printed is the median of seconds, of the ratios, with their spread, and of the ratios of processor time; beside them the best time over the
best of `cp`. Times are those of the work, without the start of Python. `--no-sync` leaves out fsync on both sides, and with it the early
writing to the disk that shortens ours. Peers, one process each:

    naive         a script of ten lines: load_file, view, transpose, save_file of each shard (safetensors.torch)
    transformers  from_pretrained, the same on the parameters, save_pretrained with the same size of shards
    llama.cpp     convert_hf_to_gguf.py of the checkout at PATH, --outtype bf16: one GGUF file, with the same rows moved

`--format` converts the same tensors from torch shards or from one GGUF file; `--ranks N` times `shard` to N ranks and `merge` of them;
`--turned` times `--conv1d` with the repack and `--linear` back, and a script that does it with torch; `--rope` the rotary order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
BENCH = HERE / ".bench"
OF_OURS = ("merge", "--linear")
"""Ways that read what ours wrote before the rounds."""
HUNGRY = ("naive", "transformers", "llama.cpp")
"""Peers that take gigabytes of memory: the last of a round."""
HIDDEN, HEADS, INNER, WORDS, SHARDS = 2048, 16, 8192, 50432, 3
TIMED = """
import json, os, sys, time
source, out, *more = sys.argv[1:]
if more[-1] == "no":
    os.fsync = os.posix_fadvise = lambda *more: None

def synced(out):
    if more[-1] != "no":
        for path in [*(os.path.join(out, name) for name in os.listdir(out)), out]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

def timed(work):
    begin, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    print("\\n" + json.dumps([seconds, cpu, int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024]))
"""
CHILDREN = {
    "triptych": """
import triptych as tt
options = {"layouts": {"*qkv*": "h (q|k|v) d"}, "h": HEADS} if source.endswith(".gguf") else {}
tt.plan(source, more[0], **options)
timed(lambda: tt.convert(source, out, more[0], workers=int(more[1]), **options))
""",
    "asked": """
import triptych as tt
asked = json.loads(more[0])
tt.plan(source, **asked)
timed(lambda: tt.convert(source, out, workers=int(more[1]), **asked))
""",
    "shard": """
import triptych as tt
tt.inspect(source), tt.shard
timed(lambda: tt.shard(source, out, int(more[0]), workers=int(more[1])))
""",
    "merge": """
import triptych as tt
tt.inspect, tt.merge
timed(lambda: tt.merge(source, out, workers=int(more[0])))
""",
    "naive": """
import shutil
from safetensors.torch import load_file, save_file

def turned(name, tensor):
    if "query_key_value" in name:
        tensor = tensor.view(HEADS, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    return tensor.t().contiguous() if more[0] == "turned" and tensor.dim() == 2 and "layers" in name else tensor

def work():
    os.mkdir(out)
    for name in os.listdir(source):
        if name.endswith(".safetensors"):
            save_file({key: turned(key, tensor) for key, tensor in load_file(os.path.join(source, name)).items()}, os.path.join(out, name))
        else:
            shutil.copy(os.path.join(source, name), out)
    synced(out)

timed(work)
""",
    "llama.cpp": """
import logging
sys.path[:0] = [os.path.join(more[0], "gguf-py"), more[0]]
sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", os.path.join(out, "out.gguf"), "--outtype", "bf16"]
import convert_hf_to_gguf as script
from conversion import base
base.AutoConfig = None  # transformers 5 drops keys of config.json that the converter reads; without it the file is read itself
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # else a tokenizer that it does not know by its hash is refused
logging.disable()

def work():
    os.mkdir(out)
    script.main()
    synced(out)

timed(work)
""",
    "transformers": """
import torch, transformers
transformers.utils.logging.disable_progress_bar()

def work():
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query_key_value" in name:
                parameter.copy_(parameter.view(HEADS, 3, -1, *parameter.shape[1:]).transpose(0, 1).reshape(parameter.shape))
    model.save_pretrained(out, max_shard_size="1GB")
    synced(out)

timed(work)
""",
}


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "gpt_neox.embed_in.weight", (WORDS, HIDDEN)
    for layer in range(layers):
        home = f"gpt_neox.layers.{layer}"
        for name, rows, columns in (("attention.query_key_value", 3 * HIDDEN, HIDDEN), ("attention.dense", HIDDEN, HIDDEN),
                                    ("mlp.dense_h_to_4h", INNER, HIDDEN), ("mlp.dense_4h_to_h", HIDDEN, INNER)):  # fmt: skip
            yield f"{home}.{name}.weight", (rows, columns)
            yield f"{home}.{name}.bias", (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{home}.{name}.weight", (HIDDEN,)
            yield f"{home}.{name}.bias", (HIDDEN,)
    yield "gpt_neox.final_layer_norm.weight", (HIDDEN,)
    yield "gpt_neox.final_layer_norm.bias", (HIDDEN,)
    yield "embed_out.weight", (WORDS, HIDDEN)


def checkpoint(layers: int) -> Path:
    """The input, made once."""
    from triptych.formats import header_bytes, index_bytes, nbytes

    folder = BENCH / f"neox-{layers}"
    if (folder / "config.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    every = [(name, shape, nbytes("BF16", shape) or 0) for name, shape in tensors(layers)]
    total, weight_map, done = sum(size for _, _, size in every), {}, 0
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[] for _ in range(SHARDS)]
    for name, shape, size in every:
        shard = min(SHARDS - 1, done * SHARDS // total)
        shards[shard].append((name, shape, size))
        done += size
    noise = random.Random(0).randbytes(1 << 22)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        at, entries = 0, []
        for name, shape, size in shard:
            entries.append((name, "BF16", shape, at, at + size))
            weight_map[name] = file
            at += size
        with (folder / file).open("wb") as out:
            out.write(header_bytes(entries, {"format": "pt"}))
            for start in range(0, at, len(noise)):
                out.write(noise[: min(len(noise), at - start)])
    (folder / "model.safetensors.index.json").write_bytes(index_bytes(weight_map, total, {}))
    config = {
        "model_type": "gpt_neox",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "intermediate_size": INNER,
        "vocab_size": WORDS,
        "architectures": ["GPTNeoXForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def clear(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    for file in (out, out.with_name("out.gguf")):
        file.unlink(missing_ok=True)


Run = tuple[float, float, float]
"""Seconds, processor seconds, peak resident MB of the work of one process."""


def copy(source: Path, out: Path, sync: bool) -> Run:
    begin, cpu = time.perf_counter(), _children()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    if sync:
        for path in [*out.iterdir(), out] if out.is_dir() else [out]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    return time.perf_counter() - begin, _children() - cpu, 0


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def child(kind: str, source: Path, out: Path, sync: bool, *more: str) -> Run:
    code = TIMED + f"HEADS = {HEADS}\n" + CHILDREN[kind]
    command = [sys.executable, "-c", code, str(source), str(out), *more, "yes" if sync else "no"]
    env = {**os.environ, "PYTHONPATH": str(HERE / "src")}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{kind}: {done.stderr}")
    seconds, cpu, rss = json.loads(done.stdout.splitlines()[-1])
    return seconds, cpu, rss


def other_format(source: Path, kind: str) -> Path:
    """The same tensors as torch shards with an index, or as one GGUF file; made once."""
    import gguf
    import torch
    from safetensors.torch import load_file

    place = source.with_name(f"{source.name}-{kind}") if kind == "bin" else source.with_name(f"{source.name}.gguf")
    if place.exists():
        return place
    shards = sorted(source.glob("*.safetensors"))
    if kind == "gguf":
        out = gguf.GGUFWriter(place, "gptneox")
        for shard in shards:
            for name, tensor in load_file(shard).items():
                data = tensor.view(torch.uint8 if tensor.dim() == 1 else torch.int16).numpy()
                name = name.replace("attention.query_key_value", "attn_qkv").replace("gpt_neox.layers", "blk")
                out.add_tensor(name, data.view("u1"), raw_dtype=gguf.GGMLQuantizationType.BF16)
        for write in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
            write()
        return place
    place.mkdir()
    shutil.copy(source / "config.json", place)
    weight_map = {}
    for shard in shards:
        tensors, name = load_file(shard), shard.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(tensors, place / name)
        weight_map |= dict.fromkeys(tensors, name)
    (place / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return place


def with_words(source: Path) -> Path:
    """The same checkpoint with all that llama.cpp's converter asks for: more of a config, and the smallest tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    place = source.with_name(f"{source.name}-words")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path in source.iterdir():
        (place / path.name).symlink_to(path)
    more = {"rotary_pct": 0.25, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "use_parallel_residual": True}
    config = json.loads((source / "config.json").read_text()) | more
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps(config))
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(place / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": words[0], "bos_token": words[0]}
    (place / "tokenizer_config.json").write_text(json.dumps(told))
    return place


def ways_of(told: argparse.Namespace, source: Path, out: Path, sync: bool) -> dict[str, Callable[[], Run]]:
    """Name -> what one run of it does."""
    made: dict[str, Callable[[], Run]] = {"cp": lambda: copy(source, out, sync)}
    again = out.with_name("again")
    shutil.rmtree(again, ignore_errors=True)
    if told.ranks:
        child("shard", source, again, False, str(told.ranks), "2")
        for workers in ("1", "2"):
            made[f"shard to {told.ranks}, {workers}"] = partial(child, "shard", source, out, sync, str(told.ranks), workers)
            made[f"merge of {told.ranks}, {workers}"] = partial(child, "merge", again, out, sync, workers)
        return made
    if told.turned or told.rope:
        there, back = (
            ({"to": told.to, "orientation": "conv1d"}, {"to": "h (q|k|v) d", "orientation": "linear"})
            if told.turned
            else ({"rope": "interleaved"}, {"rope": "half"})
        )
        if told.turned:
            child("asked", source, again, False, json.dumps(there), "2")
            made["naive"] = partial(child, "naive", source, out, sync, "turned")
        for workers in ("1", "2"):
            made[f"{'--conv1d' if told.turned else '--rope'}, {workers}"] = partial(
                child, "asked", source, out, sync, json.dumps(there), workers
            )
            if told.turned:
                made[f"--linear back, {workers}"] = partial(child, "asked", again, out, sync, json.dumps(back), workers)
        return made
    for workers in (1, 2):
        target = out.with_name("out.gguf") if told.format == "gguf" else out
        made[f"triptych, {workers}"] = partial(child, "triptych", source, target, sync, told.to, str(workers))
    if told.peers:
        made |= {kind: partial(child, kind, source, out, sync) for kind in ("naive", "transformers")}
    if told.llama_cpp:
        made["llama.cpp"] = partial(child, "llama.cpp", with_words(source), out, sync, told.llama_cpp)
    return made


def settle(out: Path, source: Path) -> None:
    """The same beginning for every run: the input in memory, room that has just been given back, nothing left to write.

    Memory that is free for seconds a virtual machine hands back to its host, and large blocks first: touching it before a run, as was done
    here once, made times of one way differ by ten times.
    """
    room = bytearray(1 << 20)
    for path in [source] if source.is_file() else source.rglob("*.*"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
    clear(out)
    os.sync()


def show(runs: dict[str, list[Run]], size: int) -> None:
    print(f"{'':<18}{'seconds':>9}{'GB/s':>8}{'/ cp':>8}{'spread':>16}{'CPU / cp':>11}{'best / cp':>12}{'MB':>6}")
    for name, found in runs.items():
        ratios, cpus = ([mine[i] / cp[i] for mine, cp in zip(found, runs["cp"], strict=True)] for i in (0, 1))
        best = min(run[0] for run in found) / min(run[0] for run in runs["cp"])
        seconds, memory = statistics.median(run[0] for run in found), max(run[2] for run in found)
        line = f"{name:<18}{seconds:>9.2f}{size / seconds / 1e9:>8.2f}{statistics.median(ratios):>8.2f}"
        more = f"{min(ratios):>9.2f} - {max(ratios):.2f}{statistics.median(cpus):>11.2f}{best:>12.2f}{memory:>6.0f}"
        print(line + (more if memory else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--to", default="(q|k|v) h d")
    parser.add_argument("--no-sync", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--llama-cpp", metavar="PATH")
    parser.add_argument("--format", choices=("safetensors", "bin", "gguf"), default="safetensors")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--turned", action="store_true")
    parser.add_argument("--rope", action="store_true")
    told = parser.parse_args()
    sys.path.insert(0, str(HERE / "src"))
    source, out, sync = checkpoint(told.layers), BENCH / "out", not told.no_sync
    if told.format != "safetensors":
        source = other_format(source, told.format)
    size, again = sum(path.stat().st_size for path in (source.iterdir() if source.is_dir() else [source])), out.with_name("again")
    ways = ways_of(told, source, out, sync)
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for number in range(told.rounds):
        order = sorted(random.Random(number).sample(list(ways), len(ways)), key=HUNGRY.__contains__)
        for place, name in enumerate(["cp", *order]):
            settle(out, again if name.startswith(OF_OURS) else source)
            run = ways[name]()
            if place:  # memory that a peer used may have gone back to the host
                runs[name].append(run)
    clear(out)
    for place in (again, source.with_name(f"{source.name}-words")):
        shutil.rmtree(place, ignore_errors=True)
    what = f"{told.ranks} ranks" if told.ranks else "--rope interleaved" if told.rope else f"{told.format}, to {told.to}"
    print(f"{size / 1e9:.2f} GB, {what}, {'synced' if sync else 'not synced'}, {told.rounds} rounds; 1 and 2: workers")
    show(runs, size)


if __name__ == "__main__":
    main()
