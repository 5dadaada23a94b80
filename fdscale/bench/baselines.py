"""Window attention as others have it: functions of (qkv, table, logit scale, window, shift) from map to map.

    official          microsoft/Swin-Transformer models/swin_transformer_v2.py, as it is written there
    SDPA              unit q and k, bias and mask as one tensor, torch's scaled_dot_product_attention
    FlexAttention     torch's flex_attention; its score_mod reads the table and adds the mask
    FlashWindow v2    github.com/emiledgl/flash-window-attention-v2, Triton: bias and mask as N x N tensors

Maps are whole windows; dtypes are as autocast or the inputs have them.
Letters: B images, H W map, C channels = h heads x d, N tokens of a window, w windows of a map.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

MASKED = -100.0
FLASH_WINDOW = "flash_win_attn_v2"  # the package


class Way(NamedTuple):
    """One way to compute window attention."""

    attend: Callable[..., Tensor]  # of qkv, table and logit scale
    trains: bool = True  # False: forward only
    exact: bool = True  # False: a bound, which leaves out part of the work
    note: str = ""


class Constants(NamedTuple):
    """What the official code keeps as buffers."""

    cells: Tensor  # (N, N) int64: cell of a flattened table for query i and key j
    regions: Tensor | None  # (w, N) see `regions`; None unless shifted
    mask: Tensor | None  # (w, 1, N, N)


def constants_of(qkv: Tensor, window: int, shift: int, masked: float = MASKED) -> Constants:
    """For maps of the size of qkv."""
    y, x = torch.meshgrid(*(torch.arange(window, device=qkv.device),) * 2, indexing="ij")
    y, x = y.flatten(), x.flatten()
    cells = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
    if not shift:
        return Constants(cells, None, None)
    cut = regions(qkv, window, shift)
    differ = (cut[:, :, None] != cut[:, None])[:, None]
    return Constants(cells, cut, torch.zeros((), device=qkv.device).masked_fill(differ, masked))


def of_others(leaves: list[Tensor], window: int, shift: int, compiled: bool) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways that are not ours, for one map, and why any is left out.

    compiled: also those that torch.compile makes, at half a minute or so each on a GPU.
    """
    gpu = leaves[0].is_cuda
    where = (window, shift, constants_of(leaves[0], window, shift))
    pinned = partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION) if gpu else nullcontext
    backend = backend_of(pinned(), leaves, *where)
    found = {"official": Way(_at(official, where)), "SDPA": Way(_under(pinned, _at(sdpa, where)), note=backend)}
    with torch.no_grad():
        added = bias_and_mask(leaves[0], leaves[1], where[2])
    frozen = _at(partial(sdpa, added=added), where)
    backend = backend_of(nullcontext(), leaves, *where, added)
    found["SDPA, frozen bias"] = Way(frozen, trains=False, exact=False, note=f"a bound; {backend}")
    left_out = {}
    if importlib.util.find_spec(FLASH_WINDOW):
        found["FlashWindow v2"] = Way(_at(flash_window, where))
    else:
        left_out["FlashWindow v2"] = f"the package {FLASH_WINDOW} is not installed"
    made = {
        "official, compiled": (_at(official, where), nullcontext, True),
        "SDPA, compiled": (_at(sdpa, where), pinned, True),
        "FlexAttention": (_at(flex, where), nullcontext, gpu),
    }
    for name, (function, context, trains) in made.items():
        if compiled:
            note = "" if trains else "forward only: no backward on a CPU"
            found[name] = Way(_under(context, torch.compile(function, dynamic=False)), trains=trains, note=note)
        else:
            left_out[name] = "to save the time that compiling takes"
    return found, left_out


def _at(function: Callable[..., Tensor], where: tuple[int, int, Constants]) -> Callable[..., Tensor]:
    def attend(qkv: Tensor, table: Tensor, logit_scale: Tensor) -> Tensor:
        return function(qkv, table, logit_scale, *where[:2], constants=where[2])

    return attend


def _under(context: Callable[[], AbstractContextManager], attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def within(*leaves: Tensor) -> Tensor:
        with context():
            return attend(*leaves)

    return within


def official(
    qkv: Tensor,
    table: Tensor,
    logit_scale: Tensor,
    window: int,
    shift: int,
    masked: float = MASKED,
    constants: Constants | None = None,
) -> Tensor:
    """Window attention as in microsoft/Swin-Transformer swin_transformer_v2.py: rolls, windows, N x N bias and mask.

    constants: made anew if not given, here and below.
    """
    constants = constants or constants_of(qkv, window, shift, masked)
    q, k, v = to_windows(qkv, len(table), window, shift)  # B w h N d each
    logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    logits = logits * logit_scale.view(-1, 1, 1).clamp(max=math.log(1.0 / 0.01)).exp()
    logits = logits + bias(table, constants)
    if constants.mask is not None:
        logits = logits + constants.mask.to(logits.dtype)
    return from_windows(logits.softmax(-1).to(v.dtype) @ v, qkv, window, shift)


def sdpa(
    qkv: Tensor,
    table: Tensor,
    logit_scale: Tensor,
    window: int,
    shift: int,
    added: Tensor | None = None,
    constants: Constants | None = None,
) -> Tensor:
    """The same by torch's scaled_dot_product_attention. added: bias and mask, if they were made before."""
    heads = len(table)
    q, k, v, added = _sdpa_inputs(qkv, table, logit_scale, window, shift, constants, added)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0)
    return from_windows(out.unflatten(1, (-1, heads)), qkv, window, shift)


def _sdpa_inputs(
    qkv: Tensor,
    table: Tensor,
    logit_scale: Tensor,
    window: int,
    shift: int,
    constants: Constants | None,
    added: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, (B, w h, N, d) each, and what is added to the logits, (1, w h, N, N)."""
    q, k, v = to_windows(qkv, len(table), window, shift)
    q, k = unit(q, k, v.dtype, logit_scale)
    if added is None:
        added = bias_and_mask(qkv, table, constants or constants_of(qkv, window, shift))
    return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), added


def unit(q: Tensor, k: Tensor, dtype: torch.dtype, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """q and k of length 1, q times the scale of its head."""
    scale = logit_scale.view(-1, 1, 1).clamp(max=math.log(1.0 / 0.01)).exp()
    return (F.normalize(q, dim=-1) * scale).to(dtype), F.normalize(k, dim=-1).to(dtype)


def bias_and_mask(qkv: Tensor, table: Tensor, constants: Constants) -> Tensor:
    """(1, w h, N, N), dtype of qkv: windows folded into heads, so that all images share it."""
    added = bias(table, constants)[None]  # 1 h N N
    if constants.mask is not None:
        added = added + constants.mask
    windows = qkv.shape[1] * qkv.shape[2] // len(constants.cells)
    return added.to(qkv.dtype).expand(windows, -1, -1, -1).reshape(1, -1, *added.shape[-2:])


def backend_of(
    context: AbstractContextManager,
    leaves: list[Tensor],
    window: int,
    shift: int,
    constants: Constants,
    added: Tensor | None = None,
) -> str:
    """The backend that torch's scaled_dot_product_attention takes, by its own choice within a context."""
    try:
        qkv, table, scale = leaves
        given = _sdpa_inputs(qkv, table, scale, window, shift, constants, added)
        with context:
            choice = torch._fused_sdp_choice(*given[:3], attn_mask=given[3], dropout_p=0.0, is_causal=False, scale=1.0)
        return f"backend {SDPBackend(choice).name}"
    except Exception as error:  # a private function of torch; the way itself says what fails
        return f"backend unknown: {type(error).__name__}"


def flex(
    qkv: Tensor, table: Tensor, logit_scale: Tensor, window: int, shift: int, constants: Constants | None = None
) -> Tensor:
    """By torch's flex_attention: bias and mask in its score_mod, so that nothing is N x N. For torch.compile."""
    batch, heads = len(qkv), len(table)
    q, k, v = to_windows(qkv, heads, window, shift)
    q, k = unit(q, k, v.dtype, logit_scale)
    windows = q.shape[1]
    cut = (constants or constants_of(qkv, window, shift)).regions

    def score_mod(score: Tensor, image: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        y, x = i // window - j // window, i % window - j % window
        score = score + table[head, y + window - 1, x + window - 1]
        if cut is None:
            return score
        return score + torch.where(cut[image % windows, i] == cut[image % windows, j], 0.0, MASKED)

    out = flex_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), score_mod=score_mod, scale=1.0)
    return from_windows(out.unflatten(0, (batch, windows)), qkv, window, shift)


def flash_window(
    qkv: Tensor, table: Tensor, logit_scale: Tensor, window: int, shift: int, constants: Constants | None = None
) -> Tensor:
    """By Flash Window Attention v2, which takes bias and mask as N x N tensors."""
    kernel: Any = importlib.import_module(FLASH_WINDOW).flash_win_attn_v2
    constants = constants or constants_of(qkv, window, shift)
    batch, heads = len(qkv), len(table)
    q, k, v = (x.flatten(0, 1).contiguous() for x in to_windows(qkv, heads, window, shift))
    masks = None if constants.mask is None else constants.mask.squeeze(1).to(v.dtype)
    scale = logit_scale.view(-1, 1, 1).clamp(max=math.log(1.0 / 0.01)).exp()
    out = kernel(q, k, v, scale, bias(table, constants).to(v.dtype), masks)
    return from_windows(out.unflatten(0, (batch, -1)), qkv, window, shift)


# ----------------------------------------------------------------------------------------------------------------------
# Windows and bias of the official code


def to_windows(qkv: Tensor, heads: int, window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, 3C) -> q, k, v, (B, w, h, N, d) each."""
    batch, height, width, channels = qkv.shape
    x = qkv.roll((-shift, -shift), (1, 2)).view(batch, height // window, window, width // window, window, channels)
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, window**2, 3, heads, channels // 3 // heads)
    q, k, v = x.permute(3, 0, 1, 4, 2, 5)
    return q, k, v


def from_windows(out: Tensor, qkv: Tensor, window: int, shift: int) -> Tensor:
    """(B, w, h, N, d) -> (B, H, W, C)."""
    batch, height, width, _ = qkv.shape
    out = out.transpose(2, 3).reshape(batch, height // window, width // window, window, window, -1)
    return out.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1).roll((shift, shift), (1, 2))


def bias(table: Tensor, constants: Constants) -> Tensor:
    """(h, N, N) from a table of displacements."""
    return table.flatten(1)[:, constants.cells]


def regions(qkv: Tensor, window: int, shift: int) -> Tensor:
    """(w, N): a number for each token; where two tokens of a window differ, the roll made them neighbours."""
    _, height, width, _ = qkv.shape
    image, number = torch.zeros(height, width, device=qkv.device), 0
    for rows in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
        for columns in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
            image[rows, columns] = number
            number += 1
    return image.view(height // window, window, width // window, window).permute(0, 2, 1, 3).reshape(-1, window**2)
