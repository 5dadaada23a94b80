"""Checks of the kernels on the machine at hand: do they repeat to the bit, and what do they do under a sanitizer?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdscale.bench import tables
from fdscale.bench.protocol import RESULTS, explain
from fdscale.bench.timing import save
from fdscale.kernels import attention

RUNS = 10
PLAIN = ("reference", "torch")  # no kernels of ours in them
# map, window, shift, heads
GPU = (
    ((24, 36), 12, 6, 8),
    ((32, 32), 16, 8, 8),
    ((24, 24), 24, 0, 16),
    ((40, 40), 40, 0, 8),
    ((6, 6), 6, 0, 16),
    ((25, 30), 7, 3, 3),
)
SMALL = (((24, 12), 12, 6, 1), ((10, 12), 8, 4, 2))  # under a sanitizer, where all is a hundred times slower
CPU = (((4, 6), 4, 2, 1),)
Place = tuple[tuple[int, int], int, int, int]


def determinism(device: torch.device, path: Path) -> None:
    """Ten runs of forward and backward by every path, shape and dtype: are all four results the same to the bit?

    Memory that is handed out anew holds NaN before each, so that what a kernel does not write is seen.
    """
    gpu = device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if gpu else (torch.float32,)
    result: dict[str, Any] = {"runs": RUNS if gpu else 2, "paths": {}, "left_out": {}}
    for name in attention.NAMES:
        if why := attention.cannot_run(name, device):
            result["left_out"][name] = why
            continue
        found = result["paths"][name] = {}
        for dtype in dtypes:
            for place in GPU if gpu else CPU:
                words = f"{str(dtype).removeprefix('torch.')}, map {place[0][0]} x {place[0][1]}, window {place[1]}"
                try:
                    found[words + ", shifted" * (place[2] > 0)] = repeats(name, place, dtype, device, result["runs"])
                except Exception as error:
                    found[words] = explain(error)
                save(path, result)
    save(path, result)


def repeats(name: str, place: Place, dtype: torch.dtype, device: torch.device, runs: int) -> str:
    """`same`, or which results differ or are not finite."""
    given = _given(place, dtype, device)
    first = _poisoned(name, given, place)
    wrong = [f"{what} not finite" for what, x in zip(RESULTS, first, strict=True) if not x.isfinite().all()]
    for _ in range(runs - 1):
        pairs = zip(RESULTS, _poisoned(name, given, place), first, strict=True)
        wrong += [f"{what} differs" for what, a, b in pairs if not torch.equal(a, b)]
    return ", ".join(dict.fromkeys(wrong)) or "same"


def once(device: torch.device) -> None:
    """Forward and backward of the paths with kernels of ours, small: what a sanitizer is to watch."""
    for name in attention.NAMES:
        if name not in PLAIN and attention.cannot_run(name, device) is None:
            for place in SMALL:
                dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
                results(name, _given(place, dtype, device), place)
            print(f"ran {name}", flush=True)


def results(name: str, given: list[Tensor], place: Place) -> list[Tensor]:
    """The map and the gradients of qkv, table and scale."""
    leaves = qkv, table, scale = [x.clone().requires_grad_() for x in given[:3]]
    _, window, shift, _ = place
    out = attention.window_attention(qkv, table, scale, (window, window), (shift, shift), by=name)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


def _given(place: Place, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    (height, width), window, _, heads = place
    generator = torch.Generator().manual_seed(window)
    qkv, grad = (torch.randn(2, height, width, n * heads * 32, generator=generator).to(dtype) for n in (3, 1))
    table = 16 * torch.randn(heads, 2 * window - 1, 2 * window - 1, generator=generator).sigmoid()
    scale = torch.tensor([10.0, 30.0, 100.0, 1000.0]).log()[torch.arange(heads) % 4]
    return [x.to(device) for x in (qkv, table, scale, grad)]


def _poisoned(name: str, given: list[Tensor], place: Place) -> list[Tensor]:
    junk = [
        torch.full((max(1, 2 * x.numel()),), math.nan, dtype=x.dtype, device=x.device) for x in given for _ in range(4)
    ]
    del junk
    return results(name, given, place)


def table(result: dict[str, Any]) -> str:
    """Markdown: what is not the same by name, else a count."""
    rows = []
    for name, found in result.get("paths", {}).items():
        bad = {words: said for words, said in found.items() if said != "same"}
        rows.append(
            (name, f"{len(found) - len(bad)} of {len(found)}", tables.join(f"{w}: {s}" for w, s in bad.items()))
        )
    lines = [f"- {name} left out: {why}" for name, why in result.get("left_out", {}).items()]
    head = ("path", f"cases that are the same in {result.get('runs')} runs", "others")
    return tables.paragraphs(tables.table(head, rows), "\n".join(lines))


def bad(result: dict[str, Any]) -> list[str]:
    """What must be the same and is not: all that has kernels of ours."""
    return [
        f"{name}, {words}: {said}"
        for name, found in result.get("paths", {}).items()
        for words, said in found.items()
        if said != "same" and name != "reference"
    ]
