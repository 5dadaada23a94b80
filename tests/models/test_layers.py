"""fdscale.models.layers: drop path against a scalar splitmix64 in Python integers and the binomial law; initialisation
against its own promise (a weight depends on seed and name alone) and the normal law."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdscale.models.layers import (
    PatchEmbed,
    add_branch,
    block_masks,
    initial_value,
    initialise,
    keep_masks,
    trunc_normal,
)

WORD = (1 << 64) - 1


def splitmix(z: int) -> int:
    """The finaliser on one unsigned word, as published."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 7, -3, 2**40])
def test_masks_follow_the_hash(seed):
    golden = 0x9E3779B97F4A7C15
    numbers = [0, 1, 2**40 + 5, 2**62 - 1]
    rates = torch.tensor([0.0, 0.3, 0.5, 0.9], dtype=torch.float64)
    masks = keep_masks(rates, seed, torch.tensor(numbers))
    for j, rate in enumerate(rates.tolist()):
        for i, number in enumerate(numbers):
            state = splitmix((splitmix(number * golden & WORD) + seed * golden) & WORD)
            uniform = (splitmix((state + (j + 1) * golden) & WORD) >> 11) / 2**53
            assert masks[j, i].item() == pytest.approx(1 / (1 - rate) if uniform < 1 - rate else 0.0)


@pytest.mark.slow
def test_a_compiler_gets_the_same_masks():
    rates, numbers = torch.linspace(0, 0.7, 30, dtype=torch.float64), torch.arange(50) + 2**40
    assert torch.equal(torch.compile(keep_masks, fullgraph=True)(rates, 7, numbers), keep_masks(rates, 7, numbers))


def test_masks_have_their_rate_and_mean_one_and_are_unrelated():
    rates = torch.tensor([0.1, 0.1, 0.5, 0.5])
    masks = keep_masks(rates, 0, torch.arange(40_000))
    assert masks.dtype is torch.float32
    dropped = masks == 0
    sigma = (rates * (1 - rates) / 40_000).sqrt()
    assert ((dropped.double().mean(1) - rates).abs() < 4 * sigma).all()
    assert ((masks.mean(1) - 1).abs() < 0.03).all()
    for other in (
        masks[3],
        keep_masks(rates, 1, torch.arange(40_000))[2],
        keep_masks(rates, 0, torch.arange(1, 40_001))[2],
    ):
        assert abs(torch.corrcoef(torch.stack((masks[2], other)))[0, 1]) < 0.03


class Tiny(nn.Module):
    """What block_masks and initialise ask of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.depths = (2, 3)
        self.drop_path_rate = 0.4
        self.drop_path_seed = 5
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def init_parameter(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
        if name != "second.bias":
            tensor.normal_(generator=generator)


def test_a_sample_keeps_its_masks_in_any_batch_and_rates_rise_linearly():
    model = Tiny()
    numbers = torch.arange(20_000)
    together = torch.stack(block_masks(model, torch.empty(20_000, 0), numbers))  # blocks 2 B
    order = torch.randperm(20_000)[:7]
    alone = torch.stack(block_masks(model, torch.empty(7, 0), numbers[order]))
    assert torch.equal(together[:, :, order], alone)
    assert together.shape == (5, 2, 20_000)
    expected = torch.linspace(0, 0.4, 5)[:, None].expand(5, 2)
    torch.testing.assert_close((together == 0).float().mean(-1), expected, rtol=0, atol=0.015)
    assert len({tuple(row) for row in together[1:].flatten(0, 1).tolist()}) == 8  # blocks and branches differ


def test_no_masks_in_evaluation_or_at_rate_zero_and_random_ones_without_numbers():
    model = Tiny()
    images = torch.empty(64, 0)
    assert block_masks(model.eval(), images, None) == [None] * 5
    model.train()
    first, second = (torch.stack(block_masks(model, images, None)) for _ in range(2))
    assert not torch.equal(first, second)
    model.drop_path_rate = 0.0
    assert block_masks(model, images, None) == [None] * 5


def test_add_branch_scales_each_sample():
    x, branch = torch.randn(3, 2, 2, 4), torch.randn(3, 2, 2, 4)
    keep = torch.tensor([0.0, 1.0, 2.0])
    expected = torch.stack([x[i] + i * branch[i] for i in range(3)])
    torch.testing.assert_close(add_branch(x, branch, keep), expected)
    assert torch.equal(add_branch(x, branch, None), x + branch)
    assert add_branch(x.bfloat16(), branch.bfloat16(), keep).dtype is torch.bfloat16


def test_a_forgotten_parameter_is_named():
    with pytest.raises(AssertionError, match=r"second\.bias"):
        initialise(Tiny(), seed=0)


def test_a_weight_depends_on_seed_and_name_alone():
    model = Tiny()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    value = initial_value(model, "first.weight", (4, 3), torch.float32, 11)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
    seed = int.from_bytes(hashlib.sha256(b"11/first.weight").digest()[:8], "little") >> 1
    assert torch.equal(value, torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))
    with torch.device("meta"):
        assert torch.equal(initial_value(model, "first.weight", (4, 3), torch.bfloat16, 11), value.bfloat16())
    assert not torch.equal(initial_value(model, "second.weight", (4, 3), torch.float32, 11), value)
    assert not torch.equal(initial_value(model, "first.weight", (4, 3), torch.float32, 12), value)


@pytest.mark.parametrize(("bound", "cut"), [(0.02, 1.0), (2.0, 100.0)])
def test_trunc_normal_is_a_normal_cut_at_the_bound(bound, cut):
    x = torch.empty(100_000)
    trunc_normal(x, torch.Generator().manual_seed(0), bound)
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    inside = math.erf(cut / math.sqrt(2))
    assert x.std().item() == pytest.approx(0.02 * math.sqrt(1 - 2 * cut * density / inside), rel=0.01)
    assert x.abs().max() <= bound


def test_patch_embedding_of_ragged_images_is_that_of_padded_ones():
    embed = PatchEmbed(4, 3, 8, norm_eps=1e-5)
    images = torch.randn(2, 3, 10, 13)
    out = embed(images)
    assert out.shape == (2, *embed.grid((10, 13)), 8) == (2, 3, 4, 8)
    torch.testing.assert_close(out, embed(F.pad(images, (0, 3, 0, 2))))
