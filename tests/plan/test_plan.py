"""The plan's arithmetic against formulas written out here, what it suggests, and what a person is told."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from helpers import ROOT

from fdscale import UserError, cli, config
from fdscale.engine import ds_config
from fdscale.models.layers import Attended
from fdscale.plan import memory, pace, search
from fdscale.plan.machines import GPUS, machine
from fdscale.plan.memory import Setup
from fdscale.plan.shapes import Networks

G = 2_997_843_680  # parameters of SwinV2-G with its 7 extra norms, by the formula of its paper's blocks
PROJECTOR = 4096 * 4096 + 4096
A100 = machine("a100-40g", None, 8)
TINY = ("schedule.steps=100", "schedule.warmup_steps=10", "optim.batch_size=64", "memory.micro_batch=8")


@pytest.fixture(scope="module")
def giant() -> Networks:
    return Networks(config.in_steps(config.load("swinv2_g"), 1_281_167))


@pytest.fixture(scope="module")
def tiny() -> Networks:
    return Networks(config.load("demo", TINY))


def zero(stage: int, **more: object) -> dict:
    ds = ds_config.read(str(ROOT / "ds_configs" / f"zero{stage}.json"))
    return {**ds, "zero_optimization": {**ds["zero_optimization"], **more}}


def test_the_giant_by_zero_stage(giant: Networks) -> None:
    n = G + PROJECTOR
    assert giant.parameters == n
    for stage, gradients, share in ((1, 6 * n, 64), (2, 4 * n / 64, 64), (3, 4 * n / 64, 64)):
        parts = memory.states(Setup(giant.settings, zero(stage, stage3_param_persistence_threshold=0), 64), giant)
        assert parts["gradients"] == pytest.approx(gradients, abs=8)
        assert parts["optimizer"] == pytest.approx(12 * n / share, abs=16)
        assert parts["parameters"] == pytest.approx(2 * n / (64 if stage == 3 else 1), abs=4)


@pytest.mark.slow
def test_the_giants_activations_are_the_inputs_of_its_blocks(giant: Networks) -> None:
    """What checkpointing keeps: the map before each block, in bf16; and little else."""
    maps = 2 * 48 * 48 * 512 + 2 * 24 * 24 * 1024 + 42 * 12 * 12 * 2048 + 4 * 6 * 6 * 4096
    kept = giant.activations(Setup(giant.settings, zero(1), 64).dtype).kept
    assert 16 * 2 * maps < kept < 16 * 2 * maps * 1.45  # besides them: patches, mergings, position tables, loss


@pytest.mark.slow
def test_parts_add_up_and_the_teacher_counts(giant: Networks) -> None:
    found = search.plan(Setup(giant.settings, zero(3), 64), giant, A100)
    assert found.memory.total == sum(found.memory.parts.values())
    assert found.memory.parts["teacher"] == pytest.approx(2 * G, rel=1e-2)
    replayed = dataclasses.replace(giant.settings, cache=dataclasses.replace(giant.settings.cache, features="x"))
    without = search.plan(Setup(replayed, zero(3), 64), giant.with_memory(replayed), A100)
    assert "teacher" not in without.memory.parts
    assert without.pace.parts["teacher"] == 0


def test_all_gather_and_reduce_scatter_take_the_slower_of_node_and_network(giant: Networks) -> None:
    one, eight = (Setup(giant.settings, zero(3), world) for world in (8, 64))
    assert pace.ring_s(10**9, one, A100) == pytest.approx(10**9 * 7 / 8 / 300e9 / 0.8)
    assert pace.ring_s(10**9, eight, A100) == pytest.approx(10**9 * 7 / 8 / 200e9 / 0.8)
    slow = machine("a100-40g", "ethernet", 8)
    assert pace.ring_s(10**9, eight, slow) == pytest.approx(10**9 * 7 / 8 / 12.5e9 / 0.8)
    assert pace.ring_s(10**9, eight, slow, ranks=8) == pace.ring_s(10**9, one, slow)


def test_attention_by_roofline_is_bound_as_the_windows_grow() -> None:
    """SwinV2-G, stage 3, batch 32 at window 12 and 2 at window 40: floors from bandwidth, and from tensor cores."""
    gpu, share = GPUS["a100-80g"], A100.attention
    on = machine("a100-80g", None, 8)
    (small,) = pace.attention_s([Attended(1, 144, 64, 32)], 32, on, fused=True)
    assert small * share == pytest.approx(32 * 144 * 64 * 260 / gpu.memory)
    (large,) = pace.attention_s([Attended(1, 1600, 64, 32)], 2, on, fused=True, backward=True)
    assert large * share == pytest.approx(2 * 1600**2 * 64 * 320 / gpu.bf16)
    (eager,) = pace.attention_s([Attended(1, 144, 64, 32)], 32, on, fused=False)
    assert eager > 10 * small


@pytest.mark.parametrize("model", ["swinv2_g", "clip_vit_base_300"])
def test_the_attention_that_backbones_tell_is_within_their_flops(model: str) -> None:
    networks = Networks(config.load(model))
    backbone, size = networks.module.backbone, (networks.settings.data.image_size,) * 2
    macs = 2 * sum(one.sequences * one.tokens**2 * one.heads * one.dim for one in backbone.attended(size))
    linear = sum(
        p.numel() * tokens
        for name, p in backbone.named_parameters()
        if p.dim() == 2 and name.startswith("blocks") and "table" not in name
        for tokens in [1 + (size[0] // backbone.stride) ** 2]
    )
    if linear:  # a ViT: all of its matrices see all tokens
        patches = backbone.patch_embed.proj.weight.numel() * (size[0] // backbone.stride) ** 2
        assert macs + linear + patches == backbone.flops(size)
    assert 0 < macs < backbone.flops(size)


@pytest.mark.slow
def test_what_does_not_fit_becomes_what_does(tiny: Networks, giant: Networks) -> None:
    before = Setup(tiny.settings, ds_config.read(None), 2)
    assert search.plan(before, tiny, A100).fits
    setup = Setup(giant.settings, ds_config.read(None), 8)
    wanted = search.plan(setup, giant, A100)
    assert not wanted.fits
    assert wanted.memory.largest == "optimizer"
    found = search.cheapest(setup, giant, A100)
    assert found is not None
    assert found.fits
    assert found.setup.world == 8
    (change,) = search.changes(setup, found.setup)
    assert (ROOT / change.removeprefix("--ds ")).is_file()


def test_the_table_of_scaling_shares_the_batch(tiny: Networks) -> None:
    setup = search.divided(Setup(tiny.settings, zero(1), 16))
    assert (setup.settings.memory.micro_batch, setup.accumulation) == (4, 1)
    with pytest.raises(UserError, match="64 cannot be shared among 24 GPUs"):
        search.divided(Setup(tiny.settings, zero(1), 24))


def run(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    code = cli.main(["plan", "demo", *(part for text in TINY for part in ("--set", text)), *words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.slow
def test_the_command_prints_and_writes_the_same(capsys: pytest.CaptureFixture) -> None:
    words = ("--gpu", "h100", "--gpus", "8,1,16", "--price", "2", "--ds", str(ROOT / "ds_configs" / "zero2.json"))
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    for part in ("memory of a GPU", "host memory of a node", "seconds of a step", "GPU-hours", "at the given price"):
        assert part in out
    code, text, _ = run(capsys, *words, "--json")
    first, *others = json.loads(text)["plans"]
    assert code == 0
    assert [first["gpus"], *(row["gpus"] for row in others)] == [8, 1, 16]
    assert first["gpu_bytes"] == sum(first["gpu_parts"].values())
    assert f"{first['gpu_bytes'] / 2**30:.2f}" in out
    assert first["cost"] == pytest.approx(2 * first["gpu_hours"])
    assert first["gpu_hours"] == pytest.approx(100 * first["step_s"] * 8 / 3600)
    assert first["checkpoint_bytes"] == 12 * Networks(config.load("demo", TINY)).parameters
    assert others[1]["micro_batch"] == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--gpu", "a100"), "nearest: a100-40g, a100-80g"),
        (("--gpu", "h100", "--network", "nrd"), "nearest: ndr"),
        (("--gpu", "h100", "--gpus", "3"), "optim.batch_size 64 is not divisible"),
        (("--gpu", "h100", "--gpus", "many"), "expected a number of GPUs"),
        (("--gpu", "h100", "--mfu", "50"), "--mfu is a share"),
        (("--gpu", "h100", "--set", "optim.batch=3"), "unknown key optim.batch"),
        (("--gpu", "h100", "--ds", "nowhere.json"), "no such ds_config file"),
    ],
)
def test_errors_are_for_a_person(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_teacher_that_is_shared_out_takes_a_share_and_is_suggested(
    giant: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SwinV2-G as its own teacher on GPUs of 9 GiB."""
    monkeypatch.setitem(GPUS, "small", GPUS["a100-40g"]._replace(memory_gib=9.0))
    small = machine("small", None, 8)
    setup = Setup(giant.settings, zero(3), 64)
    whole = search.plan(setup, giant, small)
    assert not whole.fits
    assert whole.memory.largest == "teacher"
    found = search.cheapest(setup, giant, small)
    assert found is not None
    assert found.setup.world == 64
    assert search.changes(setup, found.setup) == ["--set memory.teacher=sharded"]
    matrices = [
        2 * p.numel()
        for name, p in giant.teachers[""].network.named_parameters()
        if re.search(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight$", name)
    ]
    parts = found.memory.parts
    held = giant.teacher_bytes[""] - sum(matrices)
    assert parts["teacher"] == pytest.approx(held + sum(matrices) / 64, abs=64)
    assert parts["a teacher's gathered blocks"] == 2 * 2 * 12 * 4096**2  # stage 4's, in bf16
    assert found.pace.hidden_s > whole.pace.hidden_s
