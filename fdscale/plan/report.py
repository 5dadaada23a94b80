"""What `fdscale plan` prints, and the same as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fdscale.engine.ds_config import offloaded, stage
from fdscale.plan.machines import NETWORKS, Machine
from fdscale.plan.memory import GIB
from fdscale.plan.pace import IMAGE_BYTES
from fdscale.plan.search import Planned, changes

COUNTED = {"parameters", "gradients", "optimizer", "average of the weights", "teacher", "batch", "activations kept"}
COUNTED |= {"activations at work"}


def numbers(found: Planned, machine: Machine, price: float | None) -> dict[str, Any]:
    """Everything about one plan as plain data: bytes, seconds, and what their names say."""
    setup, pace, settings = found.setup, found.pace, found.setup.settings
    steps = settings.schedule.steps
    assert steps is not None
    rate = settings.optim.batch_size / pace.step_s
    hours = steps * pace.step_s / 3600
    peak = machine.gpu.bf16 if setup.weight_bytes == 2 else machine.gpu.float32
    workers = setup.world * settings.data.workers
    return {
        "gpus": setup.world,
        "gpu": machine.gpu_name,
        "zero": stage(setup.ds),
        "micro_batch": settings.memory.micro_batch,
        "accumulation": setup.accumulation,
        "fits": found.fits,
        "gpu_bytes": found.memory.total,
        "gpu_bytes_available": int(machine.gpu.memory_gib * GIB),
        "gpu_parts": found.memory.parts,
        "largest": found.memory.largest,
        "host_bytes_per_node": sum(found.memory.host.values()),
        "host_parts": found.memory.host,
        "step_s": pace.step_s,
        "step_parts_s": pace.parts,
        "hidden_communication_s": pace.hidden_s,
        "images_per_s": rate,
        "images_per_s_per_node": rate / setup.nodes,
        "images_per_s_per_worker": rate / workers if workers else None,
        "mfu": pace.flops / pace.step_s / peak,
        "checkpoint_bytes": pace.checkpoint_bytes,
        "checkpoint_write_s": pace.write_s,
        "disk_bytes": (settings.save.keep + 1) * pace.checkpoint_bytes,
        "steps": steps,
        "days": hours / 24,
        "gpu_hours": hours * setup.world,
        "cost": None if price is None else hours * setup.world * price,
        "notes": found.memory.notes,
    }


def text(found: Planned, machine: Machine, price: float | None, title: str) -> str:
    """One plan for a person."""
    row, setup = numbers(found, machine, price), found.setup
    settings = setup.settings
    head = (
        f"{title} on {setup.world} x {machine.gpu_name}: ZeRO {stage(setup.ds)}"
        f"{' with the optimizer offloaded' if offloaded(setup.ds) else ''}, {_precision(setup.weight_bytes)}, batch "
        f"{settings.optim.batch_size} = {setup.world} GPUs x {row['micro_batch']} x {row['accumulation']}"
    )
    parts = [(name, _gib(size), "=" if _is_counted(name) else "~") for name, size in found.memory.parts.items()]
    room = f"{machine.gpu.memory_gib:g} GiB of the GPU"
    verdict = "fits" if found.fits else f"does NOT fit; the largest part: {found.memory.largest}"
    parts.append(("peak", _gib(found.memory.total), f"of {room}: {verdict}"))
    host = [(name, _gib(size), "~") for name, size in found.memory.host.items()]
    host.append(("in all", _gib(row["host_bytes_per_node"]), ""))
    step = [(name, f"{seconds:.3f}", "~") for name, seconds in found.pace.parts.items()]
    step.append(("step", f"{row['step_s']:.3f}", f"and {row['hidden_communication_s']:.3f} s of communication hidden"))
    return "\n".join(
        [
            head,
            "",
            *_block("memory of a GPU, GiB", parts),
            *_block("host memory of a node, GiB", host),
            *_block("seconds of a step", step),
            *_run(row, setup.nodes, machine),
            *(f"note: {note}" for note in row["notes"]),
            "= counted from the real modules; ~ estimated, and not measured on a GPU: docs/plan.md says how",
        ]
    )


def _run(row: dict[str, Any], nodes: int, machine: Machine) -> list[str]:
    rate, data = row["images_per_s"], row["images_per_s_per_node"]
    worker = "" if row["images_per_s_per_worker"] is None else f", {row['images_per_s_per_worker']:.0f} per worker"
    cost = "" if row["cost"] is None else f", {row['cost']:,.0f} at the given price"
    network = f", {NETWORKS[machine.network] / 1e9:g} GB/s between nodes ({machine.network})" if nodes > 1 else ""
    return [
        f"run         {row['steps']} steps, {row['days']:.2f} days, {row['gpu_hours']:,.0f} GPU-hours{cost}",
        f"speed       {rate:,.0f} images/s, {100 * row['mfu']:.0f} % MFU of the student without recomputation",
        f"data        {data:,.0f} images/s per node ({data * IMAGE_BYTES / 1e6:.0f} MB/s of 110 kB JPEGs){worker}",
        f"checkpoint  {row['checkpoint_bytes'] / 1e9:.1f} GB, {row['checkpoint_write_s']:.0f} s in the background at "
        f"{machine.storage / 1e9:g} GB/s; {row['disk_bytes'] / 1e9:.0f} GB of disk",
        f"assumed     linear layers at {machine.mfu:g} of the peak, attention at {machine.attention:g} of its "
        "roofline,",
        f"            links at {machine.links:g}, overlap {machine.overlap:g}{network}",
    ]


def scaling(all_found: Iterable[Planned], machine: Machine, price: float | None) -> str:
    """One line for each number of GPUs; efficiency: images per GPU-second against the first line."""
    rows = [numbers(found, machine, price) for found in all_found]
    head = ["GPUs", "micro x acc.", "GPU GiB", "fits", "step s", "images/s", "efficiency", "days", "GPU-hours"]
    lines = [[*head, "cost"] if price is not None else head]
    first = rows[0]["images_per_s"] / rows[0]["gpus"]
    for row in rows:
        line = [
            str(row["gpus"]),
            f"{row['micro_batch']} x {row['accumulation']}",
            _gib(row["gpu_bytes"]),
            "yes" if row["fits"] else "no",
            f"{row['step_s']:.2f}",
            f"{row['images_per_s']:,.0f}",
            f"{row['images_per_s'] / row['gpus'] / first:.2f}",
            f"{row['days']:.2f}",
            f"{row['gpu_hours']:,.0f}",
        ]
        lines.append([*line, f"{row['cost']:,.0f}"] if price is not None else line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def suggestion(wanted: Planned, found: Planned | None, machine: Machine) -> str:
    """The cheapest that fits, as the changes that lead there."""
    if found is None:
        return "nothing fits: neither a smaller micro-batch, checkpointing, ZeRO 3 with offload nor 8 times the GPUs"
    need = f"{found.memory.total / GIB:.1f} of {machine.gpu.memory_gib:g} GiB"
    hours = found.setup.settings.schedule.steps * found.gpu_seconds / 3600  # type: ignore[operator]
    how = "\n".join(f"  {change}" for change in changes(wanted.setup, found.setup))
    return f"the cheapest that fits ({need}, {found.pace.step_s:.2f} s per step, {hours:,.0f} GPU-hours):\n{how}"


def _block(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    width = max(len(name) for name, _, _ in rows)
    return [title, *(f"  {name:<{width}} {number:>9} {mark}".rstrip() for name, number, mark in rows), ""]


def _is_counted(name: str) -> bool:
    """Also of each of several teachers, by name."""
    return name in COUNTED or (name.startswith("teacher ") and "," not in name)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _precision(weight_bytes: int) -> str:
    return "bf16" if weight_bytes == 2 else "float32"
