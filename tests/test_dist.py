"""How ranks find each other: torchrun's variables, Slurm's, or none; and how they agree."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from fdscale import UserError, dist

VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"),
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist.torch_dist, "is_initialized", lambda: False)  # other tests may have left a group of one


def test_one_process_needs_nothing() -> None:
    assert (dist.rank(), dist.world(), dist.local_rank()) == (0, 1, 0)
    assert dist.gather("x") == ["x"]
    assert dist.total(torch.ones(2)).tolist() == [1, 1]


def test_torchrun_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert (dist.rank(), dist.world(), dist.local_rank()) == (5, 8, 1)
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT is not: start with torchrun or srun"):
        dist.init()


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"RANK": "5", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({"RANK": "5", "WORLD_SIZE": "16", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x4)"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)"}, 1),  # a batch script, which is one process
    ],
)
def test_processes_of_a_node(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], count: int) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dist.local_world() == count


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[003-010,020],login1", "gpu003"), ("a1,a2", "a1"), ("node-7", "node-7"), ("n[5]", "n5")]
)
def test_srun_is_understood(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    slurm = {
        "STEP_ID": "0",
        "STEP_NUM_TASKS": "16",
        "PROCID": "9",
        "LOCALID": "1",
        "JOB_ID": "40123",
        "STEP_NODELIST": nodes,
    }
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", "")  # no scontrol: the list is read here
    assert (dist.rank(), dist.world(), dist.local_rank()) == (9, 16, 1)
    environment = dist._environment()
    assert environment["MASTER_ADDR"] == first
    assert 1024 < int(environment["MASTER_PORT"]) < 65536


def test_the_batch_script_itself_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert dist.world() == 1


def _agree(rank: int, port: int, queue: mp.Queue) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init()
    agreement = dist.Agreement("flag", "count", "silent")
    told = [{"flag": rank == 1 and step == 2, "count": rank * step} for step in range(5)]
    seen = [tuple(agreement.exchange(values).values()) for values in told]
    queue.put((rank, seen, dist.gather(rank), dist.total(torch.tensor([float(rank)])).item()))
    dist.close()


@pytest.mark.slow
def test_flags_and_counts_reach_all_ranks_one_step_later() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_agree, args=(rank, port, queue)) for rank in range(3)]
    for process in processes:
        process.start()
    found = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    for rank, (own, seen, gathered, total) in enumerate(found):
        assert own == rank
        assert seen == [(0, 0, 0), (0, 0, 0), (0, 3, 0), (1, 6, 0), (0, 9, 0)]
        assert gathered == [0, 1, 2]
        assert total == 3.0


def _meet(job: str, rank: int, port: int, told: mp.Queue, done: Any) -> None:
    slurm = {"STEP_ID": "0", "STEP_NUM_TASKS": "2", "PROCID": str(rank), "LOCALID": str(rank), "JOB_ID": job}
    os.environ.update({f"SLURM_{name}": value for name, value in slurm.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init()
        told.put((job, rank, dist.gather(job)))
        dist.close()
    except UserError as error:
        told.put((job, rank, (error.exit_code, str(error))))
    done.wait(60)


@pytest.mark.slow
def test_jobs_that_share_a_port_do_not_mix() -> None:
    """Whoever comes first: the ranks of the job whose rank 0 holds the port meet, those of the other are told so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    told, done = context.Queue(), context.Event()
    found, processes = {}, []
    for job, rank in (("1", 0), ("2", 1), ("2", 0), ("1", 1)):
        processes.append(context.Process(target=_meet, args=(job, rank, port, told, done)))
        processes[-1].start()
        if job == "2":  # its end is awaited, so that the right one comes last
            who, which, what = told.get(timeout=120)
            found[who, which] = what
    for _ in range(2):
        who, which, what = told.get(timeout=120)
        found[who, which] = what
    done.set()
    for process in processes:
        process.join(60)
    assert found["1", 0] == found["1", 1] == ["1", "1"]
    code, message = found["2", 1]
    assert code == 1
    assert f"port {port} of 127.0.0.1 is where Slurm job 1.0" in message
    assert "this is Slurm job 2.0" in message
    code, message = found["2", 0]
    assert code == 1
    assert f"cannot meet at port {port} of 127.0.0.1" in message
    assert "address already in use" in message
