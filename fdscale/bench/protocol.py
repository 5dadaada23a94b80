"""Window attention on a GPU: the layers of SwinV2-G, every way of computing them, and how they are measured.

For each layer the ways that can run there take turns, in random order in each of three rounds. In a turn a way is
warmed up and then timed, forward and backward apart, by CUDA events: as called, launches included, and replayed from a
CUDA graph, where only the GPU's own time counts. Inputs rotate among as many sets as fill the L2 cache twice. Backwards
run on retained graphs. In the first round also memory, and the error of all four results against the official formula
in float32. What fails is reported by name. On a CPU (to test this file): wall time, no graphs, no peaks.

Floors: bench/floor.py. Results are written after each layer, and a way that breaks the GPU's context for good is named
in the file, so that another start with `--resume` goes on without it.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from fdscale.bench import attention, baselines, floor, machine, tables
from fdscale.bench.attention import HEAD, Shape
from fdscale.bench.baselines import Way
from fdscale.bench.timing import save, summary, times

ROUNDS = 3
WARM_UP = 9  # calls before each measurement, fewer of slow ones
BROKEN = 3  # exit code: a way broke the GPU's context; start again with --resume
CONFIGS = {"192/W12": (48, 12, 32), "256/W16": (64, 16, 16), "384/W24": (96, 24, 8), "640/W40": (160, 40, 2)}
RESULTS = ("out", "qkv", "table", "scale")


def _rows() -> list[Shape]:
    """The layers of SwinV2-G (64, 32, 16 or 8 heads x 2), the most important first: stage 3 has 42 of its 50 layers."""

    def row(name: str, stage: int, shifted: bool = False, share: int = 1) -> Shape:
        side, window, batch = CONFIGS[name]
        side >>= stage - 1
        words = f"G {name}, stage {stage}{', shifted' * shifted}{', a quarter of the batch' * (share > 1)}"
        shift = window // 2 if shifted else 0
        return Shape(words, max(1, batch // share), side, min(window, side), shift, 8 << stage)

    rows = [row(name, 3) for name in CONFIGS]
    rows += [row(name, stage, shifted=True) for stage in (1, 2) for name in CONFIGS]
    rows.append(Shape("G 256/W16, stage 1 of a map 64 x 32, shifted", 32, 64, 16, 8, 16, 32))
    rows += [row(name, stage) for stage in (4, 1, 2) for name in CONFIGS]
    return rows + [row(name, 3, share=4) for name in CONFIGS]


ROWS = tuple(_rows())
QUICK = (ROWS[0], ROWS[4]._replace(layer="G 192/W12, stage 1, shifted, 4 images", batch=4))
TINY = (Shape("tiny, shifted", 2, 8, 4, 2, 2), Shape("tiny, not square", 1, 4, 4, 0, 2, 8))  # for a CPU


class Effort(NamedTuple):
    """How long it may take."""

    seconds: float  # of measurement for a layer, compiling not counted
    limit: float | None = None  # seconds in all: no layer is begun after them
    compiled: int | None = None  # the first so many layers have the ways of torch.compile too; None: all

    def compiles(self, number: int, passed_s: float) -> bool:
        """Whether that layer has them: not after half of the limit, since they are what takes long."""
        return (self.compiled is None or number < self.compiled) and (self.limit is None or passed_s < self.limit / 2)


class Broken(Exception):
    """A way left the GPU in a state from which this process cannot go on."""


def run(rows: Iterable[Shape], device: torch.device, effort: Effort, path: Path | None, resume: bool) -> int:
    """Measure, print Markdown and write JSON to a path, also in between. Returns the exit code."""
    start_s = time.perf_counter()
    torch._functorch.config.donated_buffer = False  # else compiled ways refuse to keep their graph
    gc.freeze()  # collecting what the imports made takes longer than most measurements
    result = json.loads(path.read_text()) if resume and path and path.exists() else {"layers": {}, "broken": {}}
    rates = floor.Rates(**result["rates"]) if "rates" in result else floor.measure(device)
    result |= {"machine": machine.describe(device), "rates": rates._asdict(), "rounds": ROUNDS, "not_measured": []}
    for number, shape in enumerate(rows):
        passed_s = time.perf_counter() - start_s
        if shape.layer in result["layers"]:
            continue
        if effort.limit is not None and passed_s > effort.limit:
            result["not_measured"].append(shape.layer)
            continue
        print(f"{shape.layer} ...", file=sys.stderr, flush=True)
        keep = partial(_keep, result, shape.layer, path)
        try:
            compiled = effort.compiles(number, passed_s)
            found = Layer(shape, device, compiled).measure(effort.seconds, result["broken"], keep)
            found |= {"floors": floor.floors(shape, rates), "clocks": machine.clocks(device)}
            result["layers"][shape.layer] = found
        except Broken as broken:
            name, why = broken.args
            result["broken"][name] = why
            keep(None)
            print(f"{name} broke the GPU's context: {why}", file=sys.stderr)
            return BROKEN
        except torch.OutOfMemoryError as error:
            result["not_measured"].append(f"{shape.layer} ({explain(error)})")
        keep(None)
        if device.type == "cuda":
            torch.compiler.reset()  # else the next shapes meet its limit on recompilations
    _keep(result, "", path, None)
    print(tables.attention(result))
    return 0


def _keep(result: dict[str, Any], layer: str, path: Path | None, way: str | None) -> None:
    """Write what there is; `way` is about to run, and to blame if nothing comes after it."""
    result["now"] = None if way is None else {"layer": layer, "way": way}
    if path:
        save(path, result)


class Layer:
    """One layer: its inputs, the ways to compute it, and what was measured of them."""

    def __init__(self, shape: Shape, device: torch.device, compiled: bool) -> None:
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        first = self._inputs(0)
        bound = 2 * _cache_bytes(device)
        self.sets = [first, *(self._inputs(seed) for seed in range(1, 1 + bound // first[0][0].nbytes))]
        with _autocast(device):
            others, left_out = baselines.of_others(first[0], shape.window, shape.shift, compiled)
        ours, unable = attention.ours(shape, device)
        self.ways = others | {name: Way(attend) for name, attend in ours.items()}
        self.found: dict[str, Any] = {
            "shape": shape._asdict(),
            "sets": len(self.sets),
            "left_out": left_out | unable,
            "ways": {
                name: {"note": way.note, "trains": way.trains, "exact": way.exact} for name, way in self.ways.items()
            },
        }
        self.seconds: dict[str, dict[str, list[float]]] = {name: {} for name in self.ways}

    def _inputs(self, seed: int) -> tuple[list[Tensor], Tensor]:
        leaves = attention.random_inputs(self.shape, self.device, self.dtype, seed)
        return leaves, torch.randn_like(leaves[0][..., : self.shape.heads * HEAD]).contiguous()

    def measure(self, seconds: float, broken: dict[str, str], keep: Callable[[str | None], None]) -> dict[str, Any]:
        """All that was found. Raises Broken(way, why)."""
        try:
            expected = exact_results(self.shape, *self.sets[0])
        except torch.OutOfMemoryError as error:
            expected = None
            self.found["no_errors"] = explain(error)
        for turn in range(ROUNDS):
            for name in random.Random(turn).sample([*self.ways], len(self.ways)):
                record = self.found["ways"][name]
                if name in broken:
                    record["failed"] = f"broke the GPU's context: {broken[name]}"
                if "failed" in record:
                    continue
                keep(name)
                try:
                    self._turn(name, seconds / (ROUNDS * len(self.ways)), expected, first=turn == 0)
                except Exception as error:
                    record["failed"] = explain(error)
                    _check_context(self.device, name, record["failed"])
                finally:
                    _free(self.device)
        for name, taken in self.seconds.items():
            self.found["ways"][name] |= {"seconds": {what: summary(x) for what, x in taken.items()}}
        return self.found

    def _turn(self, name: str, seconds: float, expected: list[Tensor] | None, first: bool) -> None:
        way, record = self.ways[name], self.found["ways"][name]
        attend = as_trained(way, self.device)
        calls: list[Callable[[], Any]] = [partial(_step, attend, *given, way.trains) for given in self.sets]
        _warm_up(calls, seconds)
        if first:
            record |= memory(attend, *self.sets[0], way.trains)
        if first and expected is not None:
            record["errors"] = errors(calls[0], expected)
        part = seconds / (4 if way.trains else 2)
        self._add(name, "forward", times([partial(attend, *leaves) for leaves, _ in self.sets], part, self.device))
        if way.trains:
            outs = [attend(*leaves) for leaves, _ in self.sets]
            calls = [partial(_back, out, *given) for out, given in zip(outs, self.sets, strict=True)]
            self._add(name, "backward", times(calls, part, self.device))
            del outs, calls
        if self.device.type != "cuda" or "not_replayed" in record:
            return
        _free(self.device)
        try:
            graphs = [capture(attend, *given, way.trains) for given in self.sets]
        except Exception as error:
            record["not_replayed"] = explain(error)
            _check_context(self.device, name, record["not_replayed"])
            return
        for graph in graphs:  # a backward reads what its forward left
            graph.forward.replay()
        self._add(name, "forward, replayed", times([graph.forward.replay for graph in graphs], part, self.device))
        if way.trains:
            backwards = [graph.backward.replay for graph in graphs if graph.backward is not None]
            self._add(name, "backward, replayed", times(backwards, part, self.device))

    def _add(self, name: str, what: str, taken: list[float]) -> None:
        self.seconds[name].setdefault(what, []).extend(taken)


def as_trained(way: Way, device: torch.device) -> Callable[..., Tensor]:
    """The way as training calls it, under autocast on a GPU; a bound without gradients."""

    def attend(*leaves: Tensor) -> Tensor:
        with _autocast(device), torch.set_grad_enabled(way.trains):
            return way.attend(*leaves)

    return attend


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def _step(attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor, trains: bool) -> list[Tensor]:
    """The result and, of a way that trains, the three gradients."""
    out = attend(*leaves)
    return [out, *_back(out, leaves, grad)] if trains else [out]


def _back(out: Tensor, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, grad.to(out.dtype), retain_graph=True)


def _warm_up(calls: list[Callable[[], Any]], seconds: float) -> None:
    """At least one call for each set of inputs."""
    calls[0]()  # compiles
    start_s = time.perf_counter()
    for number in range(1, max(WARM_UP, len(calls))):
        if number >= len(calls) and time.perf_counter() - start_s > seconds / 4:
            return
        calls[number % len(calls)]()


class Graphs(NamedTuple):
    """Forward and backward of one set of inputs as CUDA graphs, and the tensors that they write."""

    forward: Any
    backward: Any | None
    out: Tensor
    grads: tuple[Tensor, ...]


def capture(attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor, trains: bool) -> Graphs:
    """Capture a way on a stream of its own, after a call there, as torch's documentation asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _step(attend, leaves, grad, trains)
    torch.cuda.current_stream().wait_stream(stream)
    forward, backward = torch.cuda.CUDAGraph(), None
    grads: tuple[Tensor, ...] = ()
    with torch.cuda.graph(forward, stream=stream):
        out = attend(*leaves)
    if trains:
        backward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(backward, pool=forward.pool(), stream=stream):
            grads = _back(out, leaves, grad)
    return Graphs(forward, backward, out, grads)


def memory(attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor, trains: bool) -> dict[str, int]:
    """Bytes kept from forward to backward beyond inputs and result; peaks in either beyond what was there before."""
    if not leaves[0].is_cuda:
        return {"kept_bytes": attention.kept_bytes(attend, leaves)} if trains else {}
    _free(leaves[0].device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attend(*leaves)
    kept = torch.cuda.memory_allocated() - before
    found = {"kept_bytes": kept - out.nbytes, "forward_peak_bytes": torch.cuda.max_memory_allocated() - before}
    if trains:
        torch.cuda.reset_peak_memory_stats()
        grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
        found["backward_peak_bytes"] = torch.cuda.max_memory_allocated() - before
        del grads
    return found


def exact_results(shape: Shape, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The result and the gradients by the official formula in float32, an image at a time."""
    qkv, table, scale = (x.detach().float() for x in leaves)
    outs, d_qkv, sums = [], [], [torch.zeros_like(table), torch.zeros_like(scale)]
    for image, above in zip(qkv.split(1), grad.float().split(1), strict=True):
        given = [x.clone().requires_grad_() for x in (image, table, scale)]
        out = baselines.official(given[0], given[1], given[2], shape.window, shape.shift)
        grads = torch.autograd.grad(out, given, above)
        outs.append(out.detach())
        d_qkv.append(grads[0])
        sums = [a + b for a, b in zip(sums, grads[1:], strict=True)]
    return [torch.cat(outs), torch.cat(d_qkv), *sums]


def errors(call: Callable[[], list[Tensor]], expected: list[Tensor]) -> dict[str, float]:
    """Of each result: norm of the difference over the norm."""
    pairs = zip(RESULTS, call(), expected, strict=False)
    return {name: ((a.float() - e).norm() / e.norm()).item() for name, a, e in pairs}


def explain(error: Exception) -> str:
    """One line for the table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _check_context(device: torch.device, name: str, why: str) -> None:
    """Raises Broken where the GPU answers no more."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()
    except Exception:
        raise Broken(name, why) from None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _cache_bytes(device: torch.device) -> int:
    """Of the L2 cache; 64 MiB where torch does not say, and next to nothing on a CPU."""
    if device.type != "cuda":
        return 1
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
