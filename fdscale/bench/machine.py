"""What the figures of a benchmark depend on: device, driver, clocks and versions."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def describe(device: torch.device) -> dict[str, Any]:
    """As measured now: clocks are those of this moment."""
    found: dict[str, Any] = {
        "device": f"CPU ({platform.machine()})",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else None,
    }
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1) or None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **smi(device.index or 0),
    }


def clocks(device: torch.device) -> dict[str, str]:
    """Of this moment, and the temperature; nothing on a CPU."""
    found = smi(device.index or 0) if device.type == "cuda" else {}
    return {name: found[name] for name in ("clocks.sm", "clocks.mem", "temperature.gpu") if name in found}


def smi(index: int) -> dict[str, str]:
    """Driver, clocks (MHz), power limit (W) and temperature (C) as nvidia-smi says; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False))
