"""Ranks: who am I, how many are we, and what do we agree on. Works in one process without torchrun or Slurm.

`init` understands three ways of being started: torchrun (RANK, WORLD_SIZE, ...), one srun task per rank (SLURM_PROCID,
...) and plain python (one rank). Host-side agreement (flags, names, barriers) goes over a gloo group, so it never waits
for the accelerator.
"""

from __future__ import annotations

import datetime
import gc
import os
import re
import subprocess
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as torch_dist

from fdscale import UserError

PORTS = range(15000, 32000)  # to meet at under srun; the kernel gives those above to outgoing connections
WAIT = datetime.timedelta(minutes=30)  # for other ranks: at the start, and in a collective
GREETING_S = 60.0  # rank 0 writes it as soon as it listens
# PyTorch's record of each rank's last collectives; the watchdog writes it down, and so does NCCL when one times out.
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "20000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}

_host_group: Any = None  # gloo group of all ranks; the default group where that is gloo already


class Apart(UserError):
    """The ranks did not find each other, for a reason that may be gone at the next start."""

    exit_code = 1


def rank() -> int:
    """Number of this process among all, 0 in a single process."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else int(_environment().get("RANK", 0))


def world() -> int:
    """Number of processes, 1 in a single process."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else int(_environment().get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Number of this process on its node."""
    return int(os.environ.get("LOCAL_RANK") or _environment().get("LOCAL_RANK") or 0)


def local_world() -> int:
    """Number of processes on this node, as far as torchrun or Slurm tells; else 1."""
    env = os.environ
    slurm = env.get("SLURM_STEP_TASKS_PER_NODE") if "SLURM_STEP_ID" in env else None  # such as 4(x2)
    match = re.match(r"\d+", env.get("LOCAL_WORLD_SIZE") or slurm or "1")
    return min(int(match.group()), world()) if match else 1


def device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def _environment() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; empty for a single process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return {
            key: env[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if key in env
        }
    # SLURM_STEP_ID exists only inside srun; the batch script itself must count as a single process.
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))) > 1:
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")),
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "MASTER_ADDR": env.get("MASTER_ADDR")
            or _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))),
            "MASTER_PORT": env.get("MASTER_PORT") or str(_port(env)),
        }
    return {}


def _port(env: Mapping[str, str]) -> int:
    """One that the neighbouring jobs, the other steps of this one and its earlier restarts do not take."""
    job, step, restart = (int(env.get(f"SLURM_{name}") or 0) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return PORTS[(31 * job + step + 7919 * restart) % len(PORTS)]


def _first_host(nodes: str) -> str:
    """The first name in a Slurm node list such as gpu[003-010,020],login1."""
    try:
        lines = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()
        return lines[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
        if not match:
            raise UserError(f"cannot tell the first host from Slurm's node list {nodes!r}; set MASTER_ADDR") from None
        return match.group(1) + (match.group(2) or "")


def init() -> None:
    """Join the other ranks; does nothing when torch.distributed is initialised already.

    Raises UserError when the environment is half set, and Apart where another job is met.
    """
    global _host_group
    if torch_dist.is_initialized():
        return
    by_slurm = not {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    env = _environment()
    cuda = torch.cuda.is_available()
    for key, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(key, value)
    if env:
        missing = [key for key in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in env]
        if missing:
            raise UserError(
                f"RANK and WORLD_SIZE are set but {', '.join(missing)} is not: start with torchrun or srun, or unset "
                "RANK"
            )
        os.environ.update(env)
        if cuda:
            _choose_gpu()
        members: dict[str, Any] = {}
        if by_slurm:
            members = {"store": _meet(), "rank": rank(), "world_size": world()}
        torch_dist.init_process_group("nccl" if cuda else "gloo", timeout=WAIT, **members)
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        torch_dist.init_process_group(
            "nccl" if cuda else "gloo", store=torch_dist.HashStore(), rank=0, world_size=1, timeout=WAIT
        )
    _host_group = torch_dist.new_group(backend="gloo", timeout=WAIT) if cuda else torch_dist.group.WORLD


def _meet() -> torch_dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT through which the ranks of one srun find each other.

    torch's own takes whoever listens there for rank 0, and whoever comes for a rank: two jobs that share a port would
    train together, each with a part of the other. Here rank 0 says whose store it is. Raises Apart.
    """
    env = os.environ
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    job, step, restart = (env.get(f"SLURM_{name}") or "0" for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    mine = f"Slurm job {job}.{step} of cluster {env.get('SLURM_CLUSTER_NAME', 'unknown')}, restart {restart}"
    try:
        store = torch_dist.TCPStore(host, port, is_master=rank() == 0, timeout=WAIT, wait_for_workers=False)
        if rank() == 0:
            store.set("whose", mine)
        else:
            store.wait(["whose"], datetime.timedelta(seconds=GREETING_S))
        whose = store.get("whose").decode()
    except torch_dist.DistError as error:
        raise Apart(
            f"the ranks cannot meet at port {port} of {host} ({str(error).splitlines()[0]}). Another start tries "
            "another port, unless MASTER_PORT is set: set it to a free one"
        ) from None
    if whose != mine:
        raise Apart(f"port {port} of {host} is where {whose} meets; this is {mine}. Set MASTER_PORT to a free port")
    return store


def _choose_gpu() -> None:
    """Make LOCAL_RANK the number of this rank's GPU among those it can see; DeepSpeed reads it too.

    Under `srun --gpus-per-task=1` every task sees a single GPU, whatever its local rank.
    """
    visible = torch.cuda.device_count()
    if visible == 1:
        os.environ["LOCAL_RANK"] = "0"
    elif local_rank() >= visible:
        raise UserError(f"local rank {local_rank()} has no GPU: {visible} are visible; start one rank per GPU")
    torch.cuda.set_device(device())


def store() -> Any:
    """The store over which the ranks found each other, by a connection of its own; None for a single rank.

    What a thread asks there delays nobody, and needs no collective.
    """
    if world() == 1 or not torch_dist.is_initialized():
        return None
    default = torch_dist.distributed_c10d._get_default_store().clone()
    return torch_dist.PrefixStore("fdscale", default)


def close() -> None:
    """Leave the group; further calls see a single process again."""
    global _host_group
    if torch_dist.is_initialized():
        gc.collect()  # while anything in a cycle holds the group, gloo's threads live on, and may abort at exit
        torch_dist.destroy_process_group()
    _host_group = None


def gather(value: Any) -> list[Any]:
    """One plain Python value of every rank, in rank order, on all ranks.

    The values travel between our own processes only, never through a file.
    """
    if world() == 1 or not torch_dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world()
    torch_dist.all_gather_object(values, value, group=_host_group)
    return values


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place, on the tensor's own device."""
    if world() > 1 and torch_dist.is_initialized():
        torch_dist.all_reduce(tensor, group=_host_group if tensor.device.type == "cpu" else None)
    return tensor


class Agreement:
    """Named sums over all ranks, without ever waiting for a slow one inside the step.

    `exchange(values)` starts the reduction of this step's values and returns the sums of the previous step's, so all
    ranks act on the same answer at the same step, and the message has had a whole step to travel.
    """

    def __init__(self, *names: str):
        self._names = names
        self._pending: tuple[torch.Tensor, Any] | None = None

    def exchange(self, values: dict[str, float]) -> dict[str, float]:
        """The sums over ranks of the previous call's values, by name; what is not given counts as 0.

        All 0 on the first call; with one rank, this call's. Whole numbers are exact up to 2^53.
        """
        assert values.keys() <= set(self._names), values
        mine = [float(values.get(name, 0)) for name in self._names]
        if world() == 1:
            return dict(zip(self._names, mine, strict=True))
        sums = self.drain()
        self._start(mine)
        return sums

    def drain(self) -> dict[str, float]:
        """Wait for what is under way, the previous call's sums: the next call returns zeros. All ranks must call it."""
        sums = [0.0] * len(self._names)
        if self._pending is not None:
            before, work = self._pending
            self._pending = None
            work.wait()
            sums = before.tolist()
        return dict(zip(self._names, sums, strict=True))

    def _start(self, mine: list[float]) -> None:
        tensor = torch.tensor(mine, dtype=torch.float64)
        self._pending = (tensor, torch_dist.all_reduce(tensor, group=_host_group, async_op=True))
