"""What `auto` takes on a GPU, which is not needed here: the device is an argument, and what can run is pretended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import TINY

from fdscale import config, student
from fdscale.engine import memory
from fdscale.kernels import attention, check, tiled

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
CHECKS = (check.attention_is_right, check.rows_are_right)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """No check was made yet, and every implementation can run."""
    monkeypatch.delenv(attention.VARIABLE, raising=False)
    monkeypatch.setattr(attention, "cannot_run", lambda name, device: None)
    monkeypatch.setattr(check, "_failures", {})
    for function in CHECKS:
        function.cache_clear()
    yield
    for function in CHECKS:
        function.cache_clear()


def implemented(monkeypatch: pytest.MonkeyPatch, forward=tiled.forward, backward=tiled.backward) -> None:
    """Something else behind every name: on a CPU."""
    monkeypatch.setattr(
        attention, "_implementation", lambda by, device: SimpleNamespace(forward=forward, backward=backward)
    )


def test_auto_takes_the_first_that_can_run_and_is_right(monkeypatch):
    asked: list[str] = []
    right = {"fast": True, "triton": True}

    def is_right(name: str, device: torch.device) -> bool:
        asked.append(name)
        return right[name]

    monkeypatch.setattr(attention, "FASTEST", ("fast", "triton"))
    monkeypatch.setattr(check, "attention_is_right", is_right)
    assert attention.choose("auto", GPU) == "fast"
    right["fast"] = False
    assert attention.choose("auto", GPU) == "triton"
    right["triton"] = False
    assert attention.choose("auto", GPU) == "reference"
    assert asked == ["fast", "fast", "triton", "fast", "triton"]
    monkeypatch.setattr(attention, "cannot_run", lambda name, device: "no" if name == "fast" else None)
    right["triton"] = True
    asked.clear()
    assert attention.choose("auto", GPU) == "triton"
    assert asked == ["triton"]
    assert attention.choose("auto", CPU) == "reference"
    assert attention.choose("triton", GPU) == "triton"
    assert asked == ["triton"]  # by name: unchecked


def test_kernels_of_today_are_among_the_names():
    assert set(attention.FASTEST) <= set(attention.NAMES)
    assert "triton" in attention.FASTEST


def test_norm_and_loss_follow_the_attention(monkeypatch):
    checked: list[torch.device] = []

    def are_right(device: torch.device) -> bool:
        checked.append(device)
        return False

    monkeypatch.setattr(check, "attention_is_right", lambda name, device: True)
    monkeypatch.setattr(check, "rows_are_right", are_right)
    assert not check.fuses("auto", GPU)
    assert checked == [GPU]
    assert check.fuses("triton", GPU)
    assert not check.fuses("torch", GPU)
    assert not check.fuses("reference", GPU)
    assert not check.fuses("triton", CPU)
    monkeypatch.setenv(attention.VARIABLE, "triton")
    assert check.fuses("auto", GPU)
    assert checked == [GPU]


def test_what_is_right_passes_once(monkeypatch):
    calls: list[int] = []

    def forward(*arguments):
        calls.append(1)
        return tiled.forward(*arguments)

    implemented(monkeypatch, forward)
    assert check.attention_is_right("triton", CPU)
    assert check.failures() == []
    made = len(calls)
    assert made == 2  # bf16 and float32
    assert check.attention_is_right("triton", CPU)
    assert len(calls) == made


def test_what_is_wrong_is_left_out_and_named(monkeypatch):
    def loud(*arguments):
        out, lse = tiled.forward(*arguments)
        return out * 1.1, lse

    implemented(monkeypatch, loud)
    assert not check.attention_is_right("triton", CPU)
    (line,) = check.failures()
    assert line == (
        "window attention by triton is not used on cpu: in bfloat16, the result differs from the reference by 1.0e-01 "
        "of its norm; at most 3e-02 was expected"
    )


@pytest.mark.parametrize(("place", "name"), [(0, "qkv"), (1, "bias table"), (2, "logit scale")])
def test_each_gradient_is_looked_at(monkeypatch, place, name):
    def wrong(*arguments):
        found = list(tiled.backward(*arguments))
        found[place] = found[place] * float("nan")
        return tuple(found)

    implemented(monkeypatch, backward=wrong)
    assert not check.attention_is_right("triton", CPU)
    assert f"the gradient of {name} differs from the reference by nan" in check.failures()[0]


@pytest.mark.slow
def test_the_cuda_kernels_pass_where_a_cpu_emulates_them(monkeypatch, emulated):
    monkeypatch.setattr(check, "LIMITS", {torch.bfloat16: check.LIMITS[torch.bfloat16]})  # float32 is Triton's there
    assert check.attention_is_right("cuda", CPU), check.failures()


def test_float32_is_looked_at_too(monkeypatch):
    def rounded(qkv, *rest):
        out, lse = tiled.forward(qkv, *rest)
        return out.bfloat16().to(out.dtype), lse

    implemented(monkeypatch, rounded)
    assert not check.attention_is_right("triton", CPU)
    assert "in float32, the result differs" in check.failures()[0]


def test_what_does_not_start_is_left_out_and_named(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("ptxas: no such file\nand more")

    implemented(monkeypatch, broken)
    assert not check.attention_is_right("triton", CPU)
    assert check.failures()[0].endswith("in bfloat16, RuntimeError: ptxas: no such file")


def test_the_check_draws_no_number_of_the_run(monkeypatch):
    implemented(monkeypatch)
    before = torch.get_rng_state()
    check.attention_is_right("triton", CPU)
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------------------
# What a run says


def test_the_log_names_what_computes_each_stage():
    built = student.build(config.load("demo", [*TINY, "memory.kernels=reference"]))
    lines = student.about_kernels(built)
    assert lines[0].startswith("window attention: stage")
    assert "by reference (window" in lines[0]
    assert lines[1] == "residual and norm: by torch"


def test_stages_that_differ_are_named_apart():
    with torch.device("meta"):
        net = student.build_backbone(
            "swin_v2",
            {"img_size": 64, "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [1, 1, 1], "window_size": 8}
            | {"pretrained_window_sizes": [0, 0, 0]},
        )
    blocks = net.blocks()
    for block in blocks:
        block.norm1.fused = True
        block.attn.kernels = "triton"
    assert student.about_kernels(net) == [
        "window attention: stages 1-3 by triton (windows 8, 8, 4)",
        "residual and norm: fused, by triton",
    ]
    blocks[-1].attn.kernels, blocks[-1].attn.window = "reference", (4, 8)
    assert student.about_kernels(net)[0] == (
        "window attention: stages 1-2 by triton (windows 8, 8), stage 3 by reference (window 4 x 8)"
    )


def test_where_one_rank_leaves_a_kernel_out_all_do(monkeypatch):
    network = student.backbone(config.load("demo", list(TINY)))
    memory.apply(network, kernels="triton", fused=True)
    chosen = lambda: [  # noqa: E731
        (getattr(part, "kernels", None), getattr(part, "fused", None)) for part in network.modules()
    ]
    before = chosen()
    memory.agree_on_kernels(network)
    assert chosen() == before
    monkeypatch.setattr(memory.dist, "gather", lambda mine: [mine, [("reference", None), *mine[1:]]])
    memory.agree_on_kernels(network)
    assert set(chosen()) == {(None, None), ("reference", None), (None, False)}
