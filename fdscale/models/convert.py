"""State dicts in and out: dict -> dict, strict. No key is renamed by hand, none is dropped without being named here.

`load` finds out from the names where a state dict comes from, brings it to fdscale's names (the official ones of
microsoft/Swin-Transformer and of BEiT), fits what depends on the grid, and fills the model. What a source may hold
beyond the model's parameters:

| source           | known by                                         | may be left over                               |
|------------------|--------------------------------------------------|------------------------------------------------|
| fdscale          | the model's names and nothing else               | nothing                                        |
| deepspeed        | `backbone.` (ours, in training) or `module.`     | projector, head, fc_norm                       |
| official-swin-v2 | `cpb_mlp` with buffers or a head                 | buffers, head                                  |
| timm-swin-v2     | `cpb_mlp`, first downsample in `layers.1`        | buffers, head                                  |
| fd-swin-v2       | `rpe_mlp`; `encoder.` unless fine-tuned          | buffers, head, decoder, feature_model          |
| fd-vit           | `encoder.blocks.`                                | buffers, decoder, feature_model                |
| simmim-swin-v2   | `encoder.layers.` with `encoder.mask_token`      | buffers, mask_token, decoder                   |
| simmim-vit       | `encoder.blocks.` with `encoder.mask_token`      | buffers, mask_token, decoder                   |
| beit             | `blocks.` with buffers, a head or a mask token   | buffers, head, lm_head, fc_norm, mask_token    |

Buffers are relative_coords_table, relative_position_index and attn_mask, which follow from window and resolution;
feature_model is the teacher inside the official distillation checkpoints. A model without a final norm leaves `norm.*`
over too. Anything else left over, missing or of another shape is an error.

Names: microsoft/Swin-Transformer models/swin_transformer_v2.py, SwinTransformer/Feature-Distillation models/ and
utils.py, microsoft/SimMIM models/simmim.py, timm models/swin_transformer_v2.py and models/beit.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fdscale import UserError
from fdscale.kernels.reference import MASKED, displacements, windows_of
from fdscale.models.position import log_coordinates, relative_index, resize_absolute
from fdscale.models.resize import resize_table
from fdscale.models.swin_v2 import Block, Stage, SwinV2, WindowAttention
from fdscale.models.vit import ViT
from fdscale.models.weights_io import read, save, unwrap_names

__all__ = ["SOURCES", "export", "load", "read", "save"]

BUFFERS = r"(.+\.)?(relative_coords_table|relative_position_index|attn_mask)"
HEAD = (  # of whatever the backbone was trained for
    r"(head|neck|decode_head|auxiliary_head|pixel_decoder|transformer_module|class_predictor|fpn|rpn|regions|block)\..+"
)
DECODER, TEACHER = r"decoder\..+", r"feature_model\..+"

MAY_BE_LEFT_OVER: dict[str, tuple[str, ...]] = {  # source -> patterns of names (whole names)
    "fdscale": (),
    "deepspeed": (r"projector\..+", HEAD, r"fc_norm\..+"),
    "official-swin-v2": (BUFFERS, HEAD),
    "timm-swin-v2": (BUFFERS, HEAD),
    "fd-swin-v2": (BUFFERS, HEAD, DECODER, TEACHER),
    "fd-vit": (BUFFERS, DECODER, TEACHER),
    "simmim-swin-v2": (BUFFERS, r"mask_token", DECODER),
    "simmim-vit": (BUFFERS, r"mask_token", DECODER),
    "beit": (BUFFERS, HEAD, r"lm_head\..+", r"fc_norm\..+", r"mask_token"),
}
SOURCES = tuple(MAY_BE_LEFT_OVER)
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = re.compile(r"blocks\.\d+\.attn\.relative_position_bias_table")
SHOWN = 20  # lines of each kind in a diff


# --- load -------------------------------------------------------------------------------------------------------------


def load(
    model: SwinV2 | ViT, state_dict: Mapping[str, Tensor], trained: nn.Module | None = None, copy: bool = True
) -> str:
    """Fills every parameter of `model` from `state_dict` and returns the name of its source (one of SOURCES).

    Values are copied and cast to the parameter's dtype; parameters on the meta device are materialised on the CPU.
    copy=False, for a model on the meta device: its parameters become the tensors of `fitted` themselves.
    Raises UserError, leaving the model as it was, where they do not fit.
    """
    source, weights = fitted(model, state_dict, trained)
    parameters = dict(model.named_parameters())
    assign = any(parameter.is_meta for parameter in parameters.values())
    if assign and copy:  # own memory: not views into a mapped file, nor one tensor under several names
        weights = {name: weights[name].to(parameters[name].dtype, copy=True) for name in parameters}
    model.load_state_dict(weights, strict=True, assign=assign)
    return source


def fitted(
    model: SwinV2 | ViT, state_dict: Mapping[str, Tensor], trained: nn.Module | None = None
) -> tuple[str, dict[str, Tensor]]:
    """The source (one of SOURCES) and, for every parameter of `model`, which may be on the meta device, its tensor.

    No large tensor is copied or cast: they may be views into a mapped file, one of them under several names, or on the
    meta device themselves where only shapes are known yet (but not position tables, which are resized). Besides names,
    these follow the model: a shared position table becomes one per block, tables and pos_embed are resized to the
    model's grid (models/resize.py). For SwinV2 the window the weights were trained with must be the one the model
    normalises its coordinates by, as far as the buffers in the state dict tell it, or the network that the weights were
    trained in (`trained`, which may be on the meta device).

    Raises UserError for an unknown layout or with a diff of what does not fit.
    """
    parameters = dict(model.named_parameters())
    if not isinstance(model, (SwinV2, ViT)):  # somebody's own, whose names nobody else has
        ours = {name.removeprefix("backbone."): v for name, v in state_dict.items() if name.startswith("backbone.")}
        return "fdscale", _exactly(parameters, ours or dict(state_dict), "deepspeed")
    source, weights = _to_our_names(state_dict)
    kind = "SwinV2" if any(name.startswith("layers.") for name in weights) else "ViT"
    built = "SwinV2" if isinstance(model, SwinV2) else "ViT"
    if kind != built:
        raise UserError(
            f"the weights (source {source}) are of a {kind} and the model is a {built}. "
            "Build the model the weights belong to, or choose other weights."
        )
    if isinstance(model, SwinV2):
        _check_windows(model, weights, trained)
    else:
        weights = _fit_positions(model, weights, parameters)
    return source, _exactly(parameters, weights, source)


def _exactly(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """One tensor of the right shape for each parameter, or UserError with the difference."""
    permitted = MAY_BE_LEFT_OVER[source] + (() if "norm.weight" in parameters else (r"norm\.(weight|bias)",))
    missing = [name for name in parameters if name not in weights]
    unexpected = [
        name for name in weights if name not in parameters and not any(re.fullmatch(p, name) for p in permitted)
    ]
    misfit = [
        f"{name}: file {tuple(weights[name].shape)} {weights[name].dtype}, model {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in weights and (weights[name].shape != parameter.shape or not weights[name].is_floating_point())
    ]
    if missing or unexpected or misfit:
        lines = [
            f"the weights (source {source}) do not fit the model: {len(missing)} missing, "
            f"{len(unexpected)} unexpected, {len(misfit)} of another shape.",
            *_shown("- missing", missing),
            *_shown("+ unexpected", unexpected),
            *_shown("~ shape", misfit),
            _advice(parameters, weights, missing, unexpected),
        ]
        raise UserError("\n".join(lines))
    return {name: weights[name] for name in parameters}


def _shown(sign: str, entries: list[str]) -> list[str]:
    rest = [f"{sign} ... and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
    return [f"{sign} {entry}" for entry in entries[:SHOWN]] + rest


def _advice(
    parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], missing: list[str], unexpected: list[str]
) -> str:
    patches = "patch_embed.proj.weight"
    if patches in weights and patches in parameters and weights[patches].shape[1:] != parameters[patches].shape[1:]:
        _, channels, *patch = weights[patches].shape
        return (
            f"The weights are for in_chans={channels} and patch_size={patch[-1] if patch else '?'}; patches of another "
            "size or with other channels cannot be converted. Build the model with these."
        )
    if SHARED_TABLE in missing and any(map(BLOCK_TABLE.fullmatch, unexpected)):
        return "Tables per block cannot be joined into a shared one: build the model with position='per_block'."
    if any(name.startswith("norm.") for name in missing) and any(name.startswith("fc_norm.") for name in weights):
        return "The weights are of a mean-pooled classifier, without final norm: build the model with final_norm=False."
    if any(tensor.numel() == 0 for tensor in weights.values()):
        return "Some tensors are empty: ZeRO-3 keeps their parts elsewhere. Join them with zero_to_fp32.py first."
    if any(".enorm." in name for name in missing + unexpected):
        return "Extra norms (enorm) differ: set the model's extra_norm_period to that of the weights."
    return "Build the model with the depths, widths, heads and position of the weights, or choose other weights."


# --- names in ---------------------------------------------------------------------------------------------------------


def _detect(names: Iterable[str]) -> str:
    """The source, by the rules of the table at the top, first match from the top here."""
    text = "\n".join(names)

    def has(pattern: str) -> bool:
        return re.search(f"(?m)^(?:{pattern})", text) is not None

    if has(r"backbone\."):
        return "deepspeed"
    if has(r"encoder\.(layers|blocks)\."):
        kind = "swin-v2" if has(r"encoder\.layers\.") else "vit"
        return f"{'simmim' if has('encoder.mask_token') else 'fd'}-{kind}"
    if has(r"layers\.\d+\..*\.rpe_mlp\."):
        return "fd-swin-v2"
    if has(r"layers\.\d+\.blocks\.\d+\.attn\.cpb_mlp\."):
        if has(r"layers\.\d+\.downsample\.") and not has(r"layers\.0\.downsample\."):
            return "timm-swin-v2"
        return "official-swin-v2" if has(rf"{BUFFERS}$|{HEAD}") else "fdscale"
    if has(r"blocks\.\d+\.attn\.q_bias$"):
        return "beit" if has(rf"{BUFFERS}$|{HEAD}|lm_head\.|fc_norm\.|mask_token$") else "fdscale"
    first = ", ".join(text.splitlines()[:8])
    raise UserError(
        f"unknown layout of weights; the first names are: {first or '(none)'}. Known sources: {', '.join(SOURCES)}. "
        "Swin V1, timm's swinv2_cr and ViTs with a k bias are other networks and cannot be converted."
    )


def _to_our_names(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """(source, the tensors under fdscale's names, with what is left over still among them)."""
    weights = unwrap_names(state_dict)
    wrapped = bool(state_dict) and all(name.startswith("module.") for name in state_dict)
    source = _detect(weights)
    prefix = "backbone." if source == "deepspeed" else "encoder."

    def rename(name: str) -> str:
        name = name.removeprefix(prefix).replace(".rpe_mlp.", ".cpb_mlp.")
        return _shift_downsample(name, -1) if source == "timm-swin-v2" else name

    weights = _share_out(_renamed(weights, rename))
    return ("deepspeed" if wrapped and source == "fdscale" else source), weights


def _renamed(weights: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        new = rename(name)
        if new in renamed:
            raise UserError(f"two tensors would both become `{new}`, one of them `{name}`. Remove the wrong one.")
        renamed[new] = tensor
    return renamed


def _shift_downsample(name: str, by: int) -> str:
    """timm computes a downsample at the start of stage i+1, the official code at the end of stage i."""
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + by}.downsample.", name)


def _share_out(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A stage's shared bias network `layers.S.rel_pos_bias.cpb_mlp.*` given to every block of the stage."""
    for name in list(weights):
        match = re.fullmatch(r"layers\.(\d+)\.rel_pos_bias\.(cpb_mlp\..+)", name)
        if match:
            tensor = weights.pop(name)
            block = re.compile(rf"layers\.{match[1]}\.blocks\.\d+\.")
            blocks = {found[0] for other in weights if (found := block.match(other))}
            weights |= {f"{start}attn.{match[2]}": tensor for start in blocks}
    return weights


# --- SwinV2: windows --------------------------------------------------------------------------------------------------


def _check_windows(model: SwinV2, weights: Mapping[str, Tensor], trained: nn.Module | None) -> None:
    """The window that coordinates are divided by must be the one of (pre-)training, where that is known.

    The bias is a function of normalised coordinates, so another window needs no interpolation, but it does need
    pretrained_window_sizes; without it the network still runs, at a loss of accuracy (microsoft/Swin-Transformer #259).
    """
    found: dict[int, tuple[int, bool]] = {}  # stage -> (window, whether it is known to be the normalising one)
    for number, (first, *_) in enumerate(_attentions(trained) if isinstance(trained, SwinV2) else []):
        if first.pretrained_window or first.window[0] == first.window[1]:
            found[number] = (first.pretrained_window or first.window[0], True)
    for name, tensor in weights.items():
        match = re.fullmatch(rf"layers\.(\d+)\.{BUFFERS}", name)
        if match is None or tensor.ndim < 2:
            continue
        if match[3] == "relative_coords_table":
            found[int(match[1])] = (_normalising_window(name, tensor), True)
        else:  # attn_mask (windows, N, N), relative_position_index (N, N), N = window^2
            found.setdefault(int(match[1]), (math.isqrt(tensor.shape[-1]), False))
    windows = [stage[0].window for stage in _attentions(model)]
    pretrained = [stage[0].pretrained_window for stage in _attentions(model)]
    wanted = list(pretrained)
    for stage, (window, known) in found.items():
        if stage >= len(windows):
            continue  # another depth: the diff will say so
        mine = {pretrained[stage]} if pretrained[stage] else set(windows[stage])
        if mine != {window} and (known or not pretrained[stage]):
            wanted[stage] = window
    if wanted != pretrained:
        raise UserError(
            f"the weights were trained with other windows: the model has windows {windows} and pretrained_window_sizes "
            f"{pretrained}, which would misplace their position bias. Build it with pretrained_window_sizes={wanted}."
        )


def _attentions(model: SwinV2) -> list[list[WindowAttention]]:
    """The attention of each block, by stage."""
    stages = (cast(Stage, stage) for stage in model.layers)
    return [[cast(Block, block).attn for block in stage.blocks] for stage in stages]


def _normalising_window(name: str, table: Tensor) -> int:
    """W in 8 * d / (W - 1), from a table (1, 2w-1, 2w-1, 2) of sign(x) log2(|x| + 1) / 3 for x = 8 d / (W - 1)."""
    window = (table.shape[1] + 1) // 2
    if window < 2:
        return window
    furthest = 8 ** min(table.max().double().item(), 8.0) - 1  # |x| of the offset w - 1
    whole = round(1 + 8 * (window - 1) / furthest) if furthest > 0 else 0
    expected = _coords_table(window, whole)
    if whole < 2 or table.shape != expected.shape or not torch.allclose(table.float(), expected, atol=4e-3):
        raise UserError(
            f"`{name}` holds other coordinates than sign(x) log2(|x| + 1) / log2(8), x = 8 offset / (window - 1), so "
            "its bias network is another function than the model's. These weights cannot be converted."
        )
    return whole


def _coords_table(window: int, normaliser: int) -> Tensor:
    """(1, 2w-1, 2w-1, 2), the shape of the official buffer."""
    side = 2 * window - 1
    return log_coordinates((window, window), normaliser, torch.device("cpu")).clone().view(1, side, side, 2)


# --- ViT: positions ---------------------------------------------------------------------------------------------------


def _fit_positions(model: ViT, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Position tables for the model: one per block if it has them so, and of its grid."""
    fitted = dict(weights)
    block_tables = [name for name in parameters if BLOCK_TABLE.fullmatch(name)]
    if SHARED_TABLE in fitted and block_tables:
        fitted |= dict.fromkeys(block_tables, fitted.pop(SHARED_TABLE))
    for name in fitted.keys() & parameters.keys():
        if name.endswith("relative_position_bias_table"):
            fitted[name] = resize_table(fitted[name], model.built_grid)
        elif name == "pos_embed":
            fitted[name] = _resize_pos_embed(fitted[name], model.built_grid)
    return fitted


def _resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Absolute positions (1, 1 + n^2, C) of a square grid -> (1, 1 + h w, C)."""
    if pos_embed.ndim != 3 or pos_embed.shape[1] == 1 + grid[0] * grid[1]:
        return pos_embed
    side = math.isqrt(max(pos_embed.shape[1] - 1, 0))
    if side * side + 1 != pos_embed.shape[1]:
        raise UserError(
            f"pos_embed has {pos_embed.shape[1]} positions, not 1 + n^2 of a square grid, and cannot be resized to "
            f"{grid[0]} x {grid[1]}. Build the model with the grid of the weights."
        )
    return resize_absolute(pos_embed, (side, side), grid)


# --- export -----------------------------------------------------------------------------------------------------------


def export(
    source: SwinV2 | ViT | Mapping[str, Tensor], names: str = "fdscale", image_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """The parameters of a model, or of a state dict of one (also a Distiller's), under another code's names.

    names: "fdscale"; "official" for microsoft/Swin-Transformer, or BEiT and FD's ViT, whose parameters are named alike;
    "timm" for a strict load into swinv2_* with num_classes=0, or into Beit with num_classes=0 and global_pool='token'
    (with 'avg' timm has no final norm `norm`).
    image_size: (height, width) in pixels; with it and a model, "official" adds the buffers that a strict load there
    wants (for a ViT they follow its tables). Without them load there with strict=False: the official code computes its
    buffers itself.
    The parameters are those of `source`, not copies. `load` takes every form back, bit for bit.
    Raises UserError for what the other code cannot compute.
    """
    if isinstance(source, nn.Module):
        weights = {name: parameter.detach() for name, parameter in source.named_parameters()}
    else:
        origin, weights = _to_our_names(source)
        if origin not in ("fdscale", "deepspeed"):
            raise UserError(f"export takes fdscale's own weights, not {origin}. Load these into a model and export it.")
        weights = {n: t for n, t in weights.items() if not any(re.fullmatch(p, n) for p in MAY_BE_LEFT_OVER[origin])}
    if names == "fdscale":
        return weights
    if names not in ("official", "timm"):
        raise UserError(f"names={names!r} is unknown. Choose fdscale, official or timm.")
    if isinstance(source, nn.Module) and not isinstance(source, (SwinV2, ViT)):
        raise UserError(f"{type(source).__name__} has no names in other code; export it with names fdscale")
    extra = [name for name in weights if ".enorm." in name]
    if extra:
        raise UserError(
            f"{names} code has no extra norms ({len(extra)} tensors here, first {extra[0]}) and would compute "
            "something else without them. Export with names='fdscale'."
        )
    if names == "timm":
        return _renamed(weights, lambda name: _shift_downsample(name, +1))
    if image_size is not None and isinstance(source, SwinV2):
        return weights | _swin_buffers(source, image_size)
    if image_size is not None and isinstance(source, ViT):
        return weights | _vit_buffers(source)
    return weights


def _vit_buffers(model: ViT) -> dict[str, Tensor]:
    index = relative_index(model.built_grid, torch.device("cpu"))
    tables = [name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")]
    return {name.replace("bias_table", "index"): index.clone() for name in tables}


def _swin_buffers(model: SwinV2, image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Each block's coordinates, index and shift mask, in its own memory, from the functions the model computes with."""
    cpu, buffers = torch.device("cpu"), dict[str, Tensor]()
    height, width = model.patch_embed.grid(image_size)
    for s, stage in enumerate(_attentions(model)):
        for b, attention in enumerate(stage):
            window, shift = attention.window, attention.shift(height, width)
            if window[0] != window[1] or height % window[0] or width % window[1] or shift[0] != shift[1]:
                raise UserError(
                    f"stage {s} has {height} x {width} tokens and windows of {window[0]} x {window[1]} shifted by "
                    f"{shift}; the official code has square windows that divide the map. Export without image_size."
                )
            prefix = f"layers.{s}.blocks.{b}."
            buffers[f"{prefix}attn.relative_coords_table"] = _coords_table(window[0], attention.pretrained_window)
            buffers[f"{prefix}attn.relative_position_index"] = displacements(window, cpu).clone()
            region = windows_of((height, width), (0, 0), 1, window, shift, cpu).region  # (windows, N) or None
            if region is not None:
                buffers[f"{prefix}attn_mask"] = (region[:, None] != region[:, :, None]).float() * MASKED
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return buffers
