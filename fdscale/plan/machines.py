"""GPUs and networks: figures of data sheets, and the shares of them that are assumed to be reached.

Units: bytes and FLOP per second unless a name says otherwise; links per direction.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from fdscale import UserError
from fdscale.engine.metrics import PEAK_BF16


class GPU(NamedTuple):
    """One GPU. memory_gib: what torch reports as its total, rounded down (nominal 40, 80, 80 and 141 GB)."""

    memory_gib: float
    bf16: float  # dense tensor-core peak
    float32: float  # without TF32, as torch multiplies by default
    memory: float  # bandwidth
    exps: float  # exponentials per second: 16 per clock and SM
    nvlink: float  # to all GPUs of the node
    host: float  # PCIe
    network: str  # that of NVIDIA's own nodes with it


# NVIDIA's data sheets: A100 (June 2021), H100 (2023), H200 (2024), SXM versions; SMs and boost clocks from the
# architecture white papers: 108 at 1.41 GHz, 132 at 1.755 GHz.
GPUS = {
    "a100-40g": GPU(39.4, PEAK_BF16["A100"], 19.5e12, 1.555e12, 16 * 108 * 1.41e9, 300e9, 32e9, "hdr"),
    "a100-80g": GPU(79.1, PEAK_BF16["A100"], 19.5e12, 2.039e12, 16 * 108 * 1.41e9, 300e9, 32e9, "hdr"),
    "h100": GPU(79.1, PEAK_BF16["H100"], 67e12, 3.35e12, 16 * 132 * 1.755e9, 450e9, 64e9, "ndr"),
    "h200": GPU(139.8, PEAK_BF16["H200"], 67e12, 4.8e12, 16 * 132 * 1.755e9, 450e9, 64e9, "ndr"),
}

# Of a whole node. InfiniBand as in NVIDIA's DGX A100 and DGX H100: one link of 200 or 400 Gbit/s for each of 8 GPUs.
NETWORKS = {"hdr": 200e9, "ndr": 400e9, "ethernet": 12.5e9}


@dataclass(frozen=True)
class Machine:
    """What a run is planned for, and what is assumed of it. None of the shares below was measured here."""

    gpu_name: str
    network: str
    gpus_per_node: int = 8
    mfu: float = 0.5  # share of the peak that linear layers reach, with the small ops between them
    attention: float = 0.6  # share of its roofline that attention reaches
    links: float = 0.8  # share of NVLink, network and PCIe that collectives and copies reach
    overlap: float = 0.8  # share of a pass under which communication can hide
    storage: float = 2e9  # bytes per second at which all ranks together write a checkpoint
    host_memory: float = 100e9  # bandwidth of a node's memory, for DeepSpeed's CPU Adam

    @property
    def gpu(self) -> GPU:
        """The GPU's figures."""
        return GPUS[self.gpu_name]


def machine(gpu: str, network: str | None, gpus_per_node: int, **shares: float | None) -> Machine:
    """A machine by the names of its GPU and network. Raises UserError with the nearest name, or for odd numbers."""
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: no such GPU is known; {_nearest(gpu, GPUS)}")
    network = network or GPUS[gpu].network
    if network not in NETWORKS:
        raise UserError(f"--network {network}: no such network is known; {_nearest(network, NETWORKS)}")
    if gpus_per_node < 1:
        raise UserError(f"--gpus-per-node must be at least 1, got {gpus_per_node}")
    given = {name: value for name, value in shares.items() if value is not None}
    for name, value in given.items():
        if not 0 < value <= 1:
            raise UserError(f"--{name} is a share: expected more than 0 and at most 1, got {value:g}")
    return Machine(gpu, network, gpus_per_node, **given)


def _nearest(name: str, names: Iterable[str]) -> str:
    near = [known for known in names if name and known.startswith(name.lower())]
    near = near or difflib.get_close_matches(name.lower(), list(names), n=2, cutoff=0.3)
    return f"{'nearest: ' + ', '.join(near) + '; ' if near else ''}known: {', '.join(names)}"
