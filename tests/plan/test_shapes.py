"""Activations as planned on the meta device, against what torch's allocator gave out in a real step on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fdscale import assemble, config, student
from fdscale.plan.shapes import Live, Networks, _attend, with_policy

COMMON = (
    "teacher.source=timm:vit_tiny_patch16_224.augreg_in21k",
    "teacher.args={img_size: 64, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "teacher.feature=last",
    "data.image_size=64",
    "memory.micro_batch=8",
)
SWIN = (
    "student.args={embed_dim: 64, depths: [2, 2], num_heads: [1, 2], window_size: 4, drop_path_rate: 0.3, "
    "pretrained_window_sizes: [0, 0]}",
)
VIT = ("student.model=vit", "student.args={patch_size: 8, embed_dim: 128, depth: 3, num_heads: 2}")
MODELS = {"swin_v2": (*SWIN, "teacher.resample=area"), "vit": VIT}
POLICIES = {
    "none": ("none", 0),
    "torch": ("torch", 0),
    "selective": ("selective", 0),
    "deepspeed": ("deepspeed", 0),
    "fairscale": ("fairscale", 0),
    "chunks": ("none", 64),
    "torch-chunks": ("torch", 64),
}


def small(model: str, kind: str = "none", chunk: int = 0) -> config.Config:
    chunk = min(chunk, 1) if model == "vit" else chunk  # heads there, windows here
    more = (f"memory.checkpoint=[{kind}]", f"memory.attention_chunk=[{chunk}]")
    return config.load("demo", (*COMMON, *MODELS[model], *more))


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch's CPU allocator gave out and did not get back, and the most of them at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = work()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return now, peak


def real(networks: Networks, settings: config.Config) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """The module with content on the CPU, and its arguments."""
    _, module = assemble.join(settings, student.build(settings), networks.teachers)
    module = module.to_empty(device="cpu").train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    arguments = [torch.zeros(it.shape, dtype=it.dtype) for it in networks.arguments(torch.float32)]
    module(*arguments).backward()  # tables that are made once are there
    for parameter in module.parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(lambda it: setattr(it, "grad", None))
    return module, arguments


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", MODELS)
def test_activations_are_what_a_real_step_allocates(model: str, policy: str, process_group: None) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    settings = small(model, *POLICIES[policy])
    networks = Networks(settings, gpu=False)
    planned = networks.activations(torch.float32)
    module, arguments = real(networks, settings)
    kept, _ = allocated(lambda: module(*arguments))
    _, peak = allocated(lambda: module(*arguments).backward())
    assert planned.kept == pytest.approx(kept, rel=0.05)
    assert planned.peak == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_kept_is_what_autograd_saves(model: str) -> None:
    settings = small(model)
    networks = Networks(settings, gpu=False)
    module, arguments = real(networks, settings)
    own = {it.untyped_storage()._cdata for it in (*module.parameters(), *arguments)}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*arguments)
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert networks.activations(torch.float32).kept == pytest.approx(held, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["torch_offload", "fairscale_offload"])
def test_offloaded_inputs_leave_the_gpu(model: str, kind: str) -> None:
    networks = Networks(small(model), gpu=False)
    networks.activations(torch.float32)  # tables that are made once are there
    plain, moved = (networks.with_memory(small(model, one)).activations(torch.float32) for one in ("torch", kind))
    maps = (16 * 16 * 64, 8 * 8 * 128) if model == "swin_v2" else ()  # of the two blocks of each stage
    inputs = 8 * 4 * (2 * sum(maps) or 3 * 65 * 128)
    assert moved.offloaded == inputs
    assert moved.kept == plain.kept - inputs


def test_live_bytes_come_and_go() -> None:
    known = torch.empty(1000, device="meta")
    with Live([known]) as live:
        a = known + 1  # 4000 bytes
        view = a[10:]
        assert live.now == 4000
        b = view.double()  # 7920
        assert live.now == 11920
        del a, view
        assert live.now == 7920
        del b
    assert (live.now, live.peak) == (0, 11920)


def test_the_gpus_attention_keeps_no_scores_and_has_the_shapes_of_torchs() -> None:
    q, k, v = (torch.empty(2, 3, 197, 16, device="meta", requires_grad=True) for _ in range(3))
    bias = torch.empty(1, 3, 197, 197, device="meta", requires_grad=True)
    with Live([q, k, v, bias]) as live:
        out = _attend(q, k, v, bias)
        assert live.now == 4 * (out.numel() + 3 * 197 * 200 + 2 * 3 * 224) + 16  # result, bias, log-sum-exp, seeds
    assert out.shape == F.scaled_dot_product_attention(*(torch.zeros(2, 3, 197, 16) for _ in range(3))).shape
    out.sum().backward()
    assert bias.grad is not None
    assert bias.grad.shape == bias.shape


@pytest.mark.slow
def test_kernels_keep_less_than_the_reference_and_checkpointing_less_than_none() -> None:
    networks = Networks(small("swin_v2"))
    by = {}
    for kernels in ("reference", "torch", "triton", "cuda", "auto"):
        other = networks.with_memory(with_policy(networks.settings, kernels=kernels))
        by[kernels] = other.activations(torch.bfloat16)
    assert by["auto"] == by["cuda"] == by["triton"]
    assert by["triton"].kept < by["torch"].kept < by["reference"].kept
    checkpointed = networks.with_memory(with_policy(networks.settings, checkpoint=("torch",)))
    assert checkpointed.activations(torch.bfloat16).kept < by["triton"].kept / 2
