"""The op fdscale::window_attention, its implementation in tiles, and the choice: against the official formula in
float64, the reference, finite differences, and what torch asks of an op."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import (
    ADVERSARIAL,
    CASES,
    LiveBytes,
    adversarial,
    assert_as_exact_as_eager,
    gradients,
    inputs,
    leaves_of,
    random_inputs,
)
from helpers import TINY
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fdscale import UserError, config, dist, student
from fdscale.bench.attention import official
from fdscale.kernels import attention, reference, tiled
from fdscale.kernels.attention import window_attention

tiles = partial(window_attention, by="torch")
OP = torch.ops.fdscale.window_attention.default


# window, windows down and across, heads, head dim: stages of published models, and maps of one window
OFFICIAL = [
    *((6, 1, 1, 4, 16), (7, 2, 3, 4, 32), (8, 3, 2, 2, 44), (12, 1, 2, 2, 64), (14, 2, 2, 1, 32)),
    *((16, 1, 2, 2, 8), (20, 1, 1, 2, 8), (24, 1, 2, 1, 8), (32, 1, 1, 1, 8), (40, 1, 1, 1, 8)),
]


@pytest.mark.parametrize(
    ("window", "down", "across", "heads", "dim", "mask"),
    [*((*case, "-100") for case in OFFICIAL), *((*case, "-inf") for case in OFFICIAL if case[1] > 1)],
)
def test_equals_the_official_formula_in_float64(window, down, across, heads, dim, mask):
    """All four results within 1e-11 of the largest number. Both axes are shifted officially, or none."""
    data = random_inputs(2, (down * window, across * window), heads, dim, window)
    shift = window // 2 if down > 1 else 0
    theirs, ours = leaves_of(*data), leaves_of(*data)
    expected = official(*theirs, window, shift, attention.MASKS[mask])
    actual = tiles(*ours, (window, window), (shift, shift), mask=mask)
    pairs = [(actual, expected), *zip(gradients(actual, ours), gradients(expected, theirs), strict=True)]
    for a, e in pairs:
        assert (a - e).abs().max() <= 1e-11 * e.abs().max()


@pytest.mark.parametrize("mask", ["-100", "-inf"])
@pytest.mark.parametrize(("size", "window", "shift"), CASES)
@pytest.mark.parametrize("tile", [1, 200, tiled.TILE])
def test_equals_the_reference_whatever_the_tile(size, window, shift, mask, tile, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", tile)
    results = []
    for by in ("reference", "torch"):
        leaves = leaves_of(*inputs(size, window))
        out = window_attention(*leaves, window, shift, by=by, mask=mask)
        results.append([out, *gradients(out, leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "window", "shift"), [((4, 4), (2, 2), (1, 1)), ((3, 5), (2, 3), (1, 1)), ((2, 2), (2, 2), (0, 0))]
)
@pytest.mark.parametrize("mask", ["-100", "-inf"])
def test_gradients_equal_finite_differences(size, window, shift, mask):
    qkv, table, _ = inputs(size, window)
    leaves = leaves_of(qkv[:1], table, torch.tensor([0.3, 2.0], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: tiles(*x, window, shift, mask=mask), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_the_error_is_at_most_one_and_a_half_times_that_of_eager_autocast(case, dtype):
    assert_as_exact_as_eager(tiles, case, dtype)


def test_zero_rows_and_the_clamped_scale():
    qkv, table, scale = leaves_of(*(x.float() for x in adversarial("rows of zeros")))
    tiles(qkv, table, scale, (8, 8), (4, 4)).square().sum().backward()
    assert scale.grad[:2].ne(0).all()
    assert scale.grad[3] == 0  # 1000 is past the bound of 100
    assert qkv.grad.isfinite().all()


def test_it_repeats_to_the_bit():
    data = random_inputs(3, (28, 21), 3, 32, 7)

    def once() -> list[Tensor]:
        leaves = leaves_of(*(x.float() for x in data))
        out = tiles(*leaves, (7, 7), (3, 3))
        return [out, *gradients(out, leaves)]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))


@pytest.mark.slow
def test_no_more_than_a_few_tiles_of_scores_are_alive(monkeypatch):
    """The reference keeps them all. Measured beneath the op, which hides what it does."""
    monkeypatch.setattr(tiled, "TILE", 1)  # the least: one row of a window
    heads, count = 4, 32 * 32
    tile, scores = 4 * 32 * count, 4 * 2 * heads * count**2  # bytes of one tile, and of 2 windows in all heads
    data = [x.float() for x in random_inputs(1, (32, 64), heads, 8, 32)]
    where = ((32, 32), (0, 16), -100.0)
    tiled.forward(*data, *where)  # fills the index caches
    with LiveBytes() as live:
        out, lse = tiled.forward(*data, *where)
        forward = live.peak
        tiled.backward(torch.randn(out.shape), *data, out, lse, *where)
    assert forward < 2 * data[0].nbytes + 8 * tile
    assert live.peak < 4 * data[0].nbytes + 16 * tile < scores / 5
    with LiveBytes() as live:
        reference.window_attention(*data, *where[:2])
    assert live.peak > 2 * scores


@pytest.mark.slow
def test_torch_finds_no_fault_with_the_op():
    for dtype in (torch.float32, torch.bfloat16):
        qkv, table, scale = inputs((7, 10), (4, 4), torch.float32)
        arguments = ((4, 4), (2, 2), "-100", "torch")
        table = table.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as a model's, made by an MLP from cells
        leaves = leaves_of(qkv.to(dtype), table, scale)
        torch.library.opcheck(OP, (*leaves, *arguments))
        with torch.no_grad():
            out, lse = OP(*leaves, *arguments)
            backward = torch.ops.fdscale.window_attention_backward.default
            torch.library.opcheck(backward, (torch.ones_like(out), *leaves, out, lse, *arguments))


def test_autocast_changes_nothing():
    data = [x.float() for x in random_inputs(1, (16, 8), 2, 16, 8)]
    for dtype in (torch.float32, torch.bfloat16):
        ours = leaves_of(data[0].to(dtype), *data[1:])
        plain = tiles(*ours, (8, 8), (0, 0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = tiles(*ours, (8, 8), (0, 0))
            found = gradients(under, ours)
        assert under.dtype is dtype
        assert torch.equal(under, plain)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain, ours), strict=True))


def test_channels_last_and_sliced_maps_are_welcome():
    qkv, table, scale = inputs((8, 8), (4, 4), torch.float32)
    expected = tiles(qkv, table, scale, (4, 4), (2, 2))
    strange = torch.stack((qkv, qkv), -1)[..., 1]
    assert not strange.is_contiguous()
    assert torch.equal(tiles(strange, table, scale, (4, 4), (2, 2)), expected)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of the op."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is OP
        return func(*args, **(kwargs or {}))


def block(x: Tensor, weight: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    return tiles(x @ weight, table, scale, (4, 4), (2, 2)).sin()


def block_leaves() -> list[Tensor]:
    qkv, table, scale = inputs((8, 12), (4, 4), torch.float32)
    generator = torch.Generator().manual_seed(2)
    return leaves_of(qkv[..., :6], torch.randn(6, 18, generator=generator), table, scale)


@pytest.mark.parametrize("policy", ["recompute all", "keep attention"])
def test_checkpointing_recomputes_the_op_or_keeps_its_result(policy):
    leaves = block_leaves()
    out = block(*leaves)
    expected = [out, *gradients(out, leaves)]

    def keep(_, op, *args, **kwargs) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is OP else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, keep)} if policy != "recompute all" else {}
    with Calls() as calls:
        out = checkpoint(block, *leaves, use_reentrant=False, **contexts)
        actual = [out, *gradients(out, leaves)]
    assert calls.count == (2 if policy == "recompute all" else 1)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiles_into_one_graph(checkpointed):
    leaves = block_leaves()
    function = partial(checkpoint, block, use_reentrant=False) if checkpointed else block
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, block):
        out = f(*leaves)
        results.append([out, *gradients(out, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_cannot_be_is_named(monkeypatch):
    qkv, table, scale = inputs((8, 8), (4, 4))
    with pytest.raises(UserError, match=r"the bias table is \(2, 7, 7\); expected \(2, 9, 7\)"):
        window_attention(qkv, table, scale, (5, 4), (0, 0))
    with pytest.raises(UserError, match=r"qkv is \(2, 8, 8, 17\); expected \(B, H, W, 3C\), and C a multiple of 2"):
        window_attention(qkv[..., 1:], table, scale, (4, 4), (0, 0))
    with pytest.raises(UserError, match=r"the shift is \(0, 4\); expected less than the window \(4, 4\)"):
        window_attention(qkv, table, scale, (4, 4), (0, 4))
    with pytest.raises(UserError, match="mask is 'soft'; expected one of -100, -inf"):
        window_attention(qkv, table, scale, (4, 4), (0, 0), mask="soft")
    with pytest.raises(UserError, match="by 'magic': expected reference"):
        window_attention(qkv, table, scale, (4, 4), (0, 0), by="magic")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="by triton cannot run here: it needs an NVIDIA GPU"):
        window_attention(qkv, table, scale, (4, 4), (0, 0), by="triton")


def test_the_choice(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv(attention.VARIABLE, raising=False)
    assert attention.choose("auto", cpu) == "reference"
    assert attention.choose("torch", cpu) == "torch"
    monkeypatch.setenv(attention.VARIABLE, "torch")
    assert attention.choose("auto", cpu) == attention.choose("reference", cpu) == "torch"
    monkeypatch.setenv(attention.VARIABLE, "auto")
    assert attention.choose("torch", cpu) == "reference"
    monkeypatch.setenv(attention.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="FDSCALE_KERNELS is triton, which cannot run here: it needs an NVIDIA GPU"):
        attention.choose("auto", cpu)
    monkeypatch.setenv(attention.VARIABLE, "fast")
    with pytest.raises(
        UserError, match="environment variable FDSCALE_KERNELS is 'fast'; expected auto, reference, torch"
    ):
        attention.choose("auto", cpu)


def test_the_config_decides_for_a_student(monkeypatch):
    monkeypatch.delenv(attention.VARIABLE, raising=False)

    def chosen(*more: str) -> set[str]:
        built = student.build(config.load("demo", [*TINY, *more]))
        return {block.attn.kernels for block in built.blocks()}

    assert chosen() == {attention.automatic(dist.device())}
    assert chosen("memory.kernels=torch") == {"torch"}
    monkeypatch.setenv(attention.VARIABLE, "reference")
    assert chosen("memory.kernels=torch") == {"reference"}


def test_scores_of_size_one_hundred_survive_masks_of_minus_infinity():
    """Every query keeps the keys of its own region, also where padding and the seam meet in a window."""
    for size, window, shift in CASES:
        data = leaves_of(*(x.float() for x in inputs(size, window)))
        out = tiles(*data, window, shift, mask="-inf")
        assert all(x.isfinite().all() for x in (out, *gradients(out, data)))
    assert math.isinf(attention.MASKS["-inf"])
