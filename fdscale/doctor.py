"""`fdscale doctor`: what this machine can run, what is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import json as json_module
import os
import shutil
import sys
from dataclasses import asdict
from importlib import metadata

import torch
from rich.console import Console
from rich.markup import escape

from fdscale import dist
from fdscale.data import jpeg
from fdscale.engine.initialize import build_ops, prepare_environment, read_ds_config
from fdscale.kernels import attention, check
from fdscale.surroundings import Finding, file_system, surroundings

APEX = (
    "optional: NVIDIA's apex, whose fused LayerNorm and AdamW are used on a GPU where it is installed with its CUDA "
    "extensions. It is not on PyPI (`pip install apex` is another program); build it from "
    "https://github.com/NVIDIA/apex. Without it torch's own are used"
)


def main(json: bool, build: str | None, path: list[str]) -> int:
    """`fdscale doctor`; exit code 2 when something needed is missing."""
    findings = [*examine(), *(finding for folder in path for finding in file_system(folder))]
    if build is not None:
        built = build_ops(read_ds_config(build or None))
        findings.append(Finding("ok", "built", ", ".join(built) or "nothing is compiled at first use here"))
    if json:
        print(json_module.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        console = Console(highlight=False)
        colours = {"ok": "green", "missing": "red", "warning": "yellow", "optional": "blue"}
        for finding in findings:
            mark = f"[{colours[finding.state]}]{finding.state:<8}[/{colours[finding.state]}]"
            console.print(f"{mark} {finding.what:<16} {escape(finding.detail)}", soft_wrap=True)
    return 2 if any(finding.state == "missing" for finding in findings) else 0


def examine() -> list[Finding]:
    """All findings, most basic first."""
    prepared = _prepared()
    return [
        _python(),
        *(_package(name) for name in ("torch", "torchvision", "deepspeed", "timm", "webdataset")),
        _device(),
        prepared,
        _jpeg(),
        _attention(),
        _fused(),
        *_optional(),
        *surroundings(),
    ]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("ok" if good else "missing", "python", version if good else f"{version}; tested on 3.11 to 3.13")


def _package(name: str) -> Finding:
    try:
        return Finding("ok", name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding("missing", name, f"pip install {name}, or install the versions of requirements.lock")


def _device() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("ok", "device", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}, nccl; bf16 and float32")
    return Finding("ok", "device", f"no GPU: CPU with {os.cpu_count()} cores and gloo; every command works, slowly")


def _prepared() -> Finding:
    try:
        prepare_environment()
    except ValueError as error:
        return Finding("missing", "C++ compiler", str(error))
    ninja = shutil.which("ninja")
    if ninja is None:
        return Finding("missing", "ninja", "pip install ninja (DeepSpeed builds a small C++ op with it)")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    return Finding(
        "ok",
        "build tools",
        f"{compiler or 'no compiler; one is needed only for optimizer offload'}, {ninja}",
    )


def _jpeg() -> Finding:
    missing = jpeg.missing()
    if missing is None:
        return Finding("ok", "JPEG decoder", "compiled part over Pillow's libjpeg-turbo: about three times as fast")
    return Finding("optional", "JPEG decoder", f"Pillow alone: the same pixels, but slower; {missing}")


def _attention() -> Finding:
    able: list[str] = []
    unable: list[str] = []
    for name in attention.NAMES:
        why = attention.cannot_run(name, dist.device())
        (able if why is None else unable).append(name if why is None else f"{name} cannot run here: {why}")
    auto = f"auto takes {attention.automatic(dist.device())}"  # on a GPU, checks it
    return Finding("ok", "window attention", "; ".join([f"memory.kernels: {', '.join(able)}", auto, *unable]))


def _fused() -> Finding:
    """After `_attention`, whose checks fail here too."""
    device = dist.device()
    fused = device.type == "cuda" and attention.cannot_run("triton", device) is None and check.rows_are_right(device)
    what = "residual and norm, whitening and loss: " + ("fused, by triton, with its attention" if fused else "by torch")
    failures = check.failures()
    return Finding("optional" if failures else "ok", "fused ops", "; ".join([what, *failures]))


def _optional() -> list[Finding]:
    hints = {
        "apex": APEX,
        "torchao": "optional: 8-bit products in training, for H100 and later; pip install 'fdscale[fp8]'",
        "fairscale": "optional: activation checkpointing with CPU offload; pip install 'fdscale[fairscale]'",
        "tensorboard": "optional: curves; pip install 'fdscale[tensorboard]'",
        "wandb": "optional: logging to Weights & Biases; pip install 'fdscale[wandb]'",
        "transformers": "optional: segment.head=mask2former; pip install 'fdscale[mask2former]'",
        "cv2": "optional: detect.instaboost; pip install 'fdscale[instaboost]'",
        "matplotlib": "optional: `fdscale diagnose` and the demo's picture; pip install 'fdscale[demo]'",
    }
    findings = []
    for name, hint in hints.items():
        found = importlib.util.find_spec(name) is not None
        if name == "apex" and found and importlib.util.find_spec("apex.normalization") is None:
            findings.append(
                Finding("optional", name, "the installed package called apex is not NVIDIA's and is not used; " + hint)
            )
        else:
            findings.append(Finding("ok" if found else "optional", name, "found" if found else hint))
    return findings
