"""fdscale.kernels.reference against a loop over single queries written from the definition, finite differences, and
counts of the bytes that live while it runs. (Against timm: tests/models/test_swin_v2.py.)

Letters: B images, H W map, h heads, d channels of a head, N tokens of a window.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CASES, LiveBytes, inputs
from torch import Tensor

from fdscale.kernels.reference import window_attention


def one_query_at_a_time(
    qkv: Tensor, table: Tensor, logit_scale: Tensor, window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """The definition, without rolls or partitions: every query looks for its keys among all real tokens."""
    batch, height, width, channels = qkv.shape
    heads = len(table)
    q, k, v = qkv.view(batch, height, width, 3, heads, -1).unbind(3)  # B H W h d each
    sizes = [math.ceil(length / w) * w for length, w in zip((height, width), window, strict=True)]

    def where(token: tuple[int, int]) -> tuple[list[int], list[int], list[bool]]:
        """Window, place in it, and whether the roll carried the token across the edge, per axis."""
        rolled = [(p - s) % size for p, s, size in zip(token, shift, sizes, strict=True)]
        places = [divmod(r, w) for r, w in zip(rolled, window, strict=True)]
        return [p[0] for p in places], [p[1] for p in places], [p < s for p, s in zip(token, shift, strict=True)]

    tokens = list(itertools.product(range(height), range(width)))
    places = {token: where(token) for token in tokens}
    out = torch.zeros(batch, height, width, heads, channels // 3 // heads, dtype=qkv.dtype)
    for b, head, query in itertools.product(range(batch), range(heads), tokens):
        keys = [token for token in tokens if places[token][0] == places[query][0]]
        logits = []
        for key in keys:
            a, c = q[b, query[0], query[1], head], k[b, key[0], key[1], head]
            dy, dx = (i - j for i, j in zip(places[query][1], places[key][1], strict=True))
            logit = (a @ c) / (a.norm() * c.norm()) * min(math.exp(logit_scale[head]), 100.0)
            logit = logit + table[head, dy + window[0] - 1, dx + window[1] - 1]
            logits.append(logit if places[query][2] == places[key][2] else logit - 100.0)
        weights = torch.stack(logits).softmax(0)
        out[b, query[0], query[1], head] = sum(w * v[b, y, x, head] for w, (y, x) in zip(weights, keys, strict=True))
    return out.flatten(3)


@pytest.mark.parametrize(("size", "window", "shift"), CASES)
def test_equals_the_definition(size, window, shift):
    qkv, table, scale = inputs(size, window)
    expected = one_query_at_a_time(qkv, table, scale, window, shift)
    torch.testing.assert_close(window_attention(qkv, table, scale, window, shift), expected, rtol=0, atol=1e-12)
    narrow = window_attention(qkv.float(), table.float(), scale.float(), window, shift)
    torch.testing.assert_close(
        narrow, expected.float(), rtol=0, atol=1e-4
    )  # logits up to 100: float32 resolves 1e-5 of them


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize(
    ("size", "window", "shift"), [((4, 4), (2, 2), (1, 1)), ((3, 5), (2, 3), (1, 1)), ((2, 2), (2, 2), (0, 0))]
)
def test_gradients_equal_finite_differences(size, window, shift, chunk):
    qkv, table, _ = inputs(size, window)
    leaves = [x.requires_grad_() for x in (qkv[:1], table, torch.tensor([0.3, 2.0], dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *x: window_attention(*x, window, shift, chunk), leaves)


def test_the_clamped_logit_scale_has_no_gradient_and_zero_rows_no_nan():
    qkv, table, scale = inputs((4, 4), (2, 2), torch.float32)
    qkv[0, 0, 0] = 0.0
    qkv.requires_grad_()
    scale.requires_grad_()
    window_attention(qkv, table, scale, (2, 2), (1, 1)).square().sum().backward()
    assert scale.grad[0] != 0
    assert scale.grad[1] == 0  # exp(9) is past the bound of 100
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_go_in_and_out_and_the_softmax_is_wide(dtype):
    qkv, table, scale = inputs((8, 8), (4, 4))
    qkv = qkv.to(dtype)
    expected = window_attention(qkv.double(), table, scale, (4, 4), (2, 2))
    out = window_attention(qkv, table.float(), scale.float(), (4, 4), (2, 2))
    assert out.dtype is dtype
    # Only the weights and the result are rounded; 16-bit logits of size 100 would be off by 0.5 and 0.06.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2.5 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            window_attention(qkv, table.float(), scale.float(), (4, 4), (2, 2)), out, rtol=0, atol=0
        )


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
@pytest.mark.parametrize(
    ("size", "window", "shift"), [((8, 12), (4, 4), (2, 2)), ((7, 10), (4, 4), (2, 2)), ((8, 8), (4, 4), (0, 0))]
)
def test_chunks_equal_the_whole(size, window, shift, chunk):
    results = []
    for k in (0, chunk):
        leaves = [x.requires_grad_() for x in inputs(size, window, torch.float32)]
        out = window_attention(*leaves, window, shift, k)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad / x.grad.abs().max() for x in leaves)])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_in_chunks_the_scores_of_one_chunk_are_alive_at_a_time():
    heads, count, windows = 4, 64, 16
    scores = heads * count * count * 4  # bytes of the N x N scores of one window

    def bytes_at(chunk: int) -> tuple[int, int]:
        """Alive between forward and backward, and at most."""
        qkv = torch.randn(4, 16, 16, 3 * heads * 2, requires_grad=True)
        table = torch.rand(heads, 15, 15, requires_grad=True)
        scale = torch.ones(heads, requires_grad=True)
        window_attention(qkv, table, scale, (8, 8), (4, 4), chunk)  # fills the index caches
        with LiveBytes() as live:
            out = window_attention(qkv, table, scale, (8, 8), (4, 4), chunk).sum()
            kept = live.now()
            out.backward()
        return kept, live.peak

    kept, peak = zip(*(bytes_at(chunk) for chunk in (0, 8, 4, 2, 1)), strict=True)
    assert kept[0] > 2 * windows * scores  # the weights, and the products that the scale's gradient needs
    assert max(kept[1:]) < 6 * scores  # the bias of one window, and maps of d numbers per token and head
    assert list(peak) == sorted(peak, reverse=True)
    for chunk, total in zip((16, 8, 4, 2, 1), peak, strict=True):
        assert 3 * chunk * scores < total < (6 * chunk + 6) * scores


def test_index_caches_filled_in_inference_mode_serve_training():
    size, window = (6, 10), (2, 5)  # used by no other test
    with torch.inference_mode():
        window_attention(*inputs(size, window), window, (1, 2))
    leaves = [x.requires_grad_() for x in inputs(size, window)]
    window_attention(*leaves, window, (1, 2)).sum().backward()
    assert all(x.grad is not None for x in leaves)
