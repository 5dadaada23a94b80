"""One run carried over other numbers of ranks and other ZeRO stages, against the same run left alone.

Drop path, augmentation and an average of the weights are on; each hop is a start of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_resume import losses, samples

from faults.conftest import LONG
from faults.starts import Starts
from fdscale.engine.reader import Reader

pytestmark = [pytest.mark.slow, pytest.mark.faults]

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
SETTINGS = (
    "optim.batch_size=12",
    "data.lanes=12",
    "optim.ema=0.5",
    "schedule.steps=7",
    "schedule.warmup_steps=2",
    "save.every=100",
    "log.heldout_every=7",
)
# ranks, stage, and the step to stop at
LEFT_ALONE = ((1, 0, 7),)
CHAIN = ((1, 0, 1), (1, 0, 2), (2, 3, 3), (1, 1, 4), (2, 2, 5), (4, 0, 6), (3, 3, 7))
CHAINS = [CHAIN, *([((1, 3, 1), (2, 0, 2), (1, 2, 3), (2, 1, 4), (4, 3, 5), (3, 2, 6), (1, 0, 7))] if LONG else [])]
CHAIN_BF16 = ((1, 1, 1), (2, 3, 2), (1, 2, 3), (2, 2, 4), (4, 1, 5), (3, 3, 7)) if LONG else ((1, 1, 2), (2, 3, 7))


@pytest.fixture(scope="module")
def whole(starts: Starts, shards: Path) -> Path:
    return carry(starts, shards, LEFT_ALONE)


def carry(starts: Starts, shards: Path, hops: tuple, precision: dict | None = None) -> Path:
    """A run that ends and starts again at each hop."""
    run = starts.new()
    for world, stage, stop_at in hops:
        micro = f"memory.micro_batch={4 if world == 3 else 3}"
        codes = starts.run(
            run,
            world=world,
            stage=stage,
            more=(*SETTINGS, micro, f"data.heldout_shards={shards}"),
            options=("--steps", str(stop_at)),
            precision=precision,
        )
        assert set(codes) == {0}, starts.output(run).read_text()
    return run


def worlds(hops: tuple) -> int:
    """The most ranks there were."""
    return max(world for world, _, _ in hops)


def follows(run: Path, whole: Path, loss_within: float, norm_within: float, ranks: int) -> None:
    """Samples the same; losses, norms and rates within a tolerance."""
    assert samples(run, ranks) == samples(whole, 1)
    assert losses(run).keys() == losses(whole).keys()
    for step, (loss, norm, lr) in losses(whole).items():
        wanted = (pytest.approx(loss, rel=loss_within), pytest.approx(norm, rel=norm_within), lr)
        assert losses(run)[step] == wanted, step


def furthest(run: Path, whole: Path, key: str) -> float:
    """The largest difference of a vector of any parameter after the last step."""
    one, other = (Reader(path / "checkpoints" / "step-00000007") for path in (run, whole))
    assert one.state["optimizer_step"] == other.state["optimizer_step"] == 7
    assert [group["names"] for group in one.state["groups"]] == [group["names"] for group in other.state["groups"]]
    assert one.state["groups"] == other.state["groups"]
    return max((one.full(name, key) - other.full(name, key)).abs().max().item() for name in one.state["parameters"])


@pytest.mark.parametrize("hops", CHAINS, ids=["from-zero0", "from-zero3"][: len(CHAINS)])
def test_a_run_goes_on_at_any_number_of_ranks_and_stage(starts: Starts, shards: Path, whole: Path, hops: tuple) -> None:
    run = carry(starts, shards, hops)
    follows(run, whole, 1e-5, 1e-5, worlds(hops))
    alone = [step for step in (1, 2) if hops[step - 1][:2] == (1, 0)]
    assert all(losses(run)[step] == losses(whole)[step] for step in alone)  # bitwise at the same world and stage
    for key in ("fp32", "exp_avg", "ema"):
        assert furthest(run, whole, key) < 1e-5, key


def test_in_bf16_too(starts: Starts, shards: Path) -> None:
    whole = carry(starts, shards, ((1, 1, 7),), BF16)
    run = carry(starts, shards, CHAIN_BF16, BF16)
    follows(run, whole, 2e-3, 1e-2, worlds(CHAIN_BF16))
    assert losses(run)[1] == losses(whole)[1]


def test_the_average_is_evaluated_beside_the_weights(whole: Path) -> None:
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if "heldout_loss_ema" in record]
    assert [record["step"] for record in found if record["step"]] == [7]
    assert found[-1]["heldout_loss_ema"] != found[-1]["heldout_loss"]
    reader = Reader(whole / "checkpoints" / "step-00000007")
    name = next(iter(reader.state["parameters"]))
    assert not torch.equal(reader.full(name), reader.full(name, "ema"))
