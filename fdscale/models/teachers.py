"""Where teachers come from.

`load_teacher` builds a `Teacher` (models/frozen.py) from a source:

- ``timm:NAME`` a network of timm with its tag, e.g. timm:vit_base_patch16_clip_quickgelu_224.openai
- ``fdscale:swin_v2``, ``fdscale:vit`` a network of this project, e.g. a SwinV2-G from a local checkpoint
- ``python:MODULE:CALLABLE`` any torch module; see `_from_python` for what the callable must return

A wrong norm, activation or normalisation would not fail, it would only teach something else; so whatever is in doubt is
an error here. Nothing is downloaded.

Shapes: B images, H x W pixels, L = P + h * w tokens (P before the grid), C channels.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdscale import UserError
from fdscale.models import BACKBONES, convert
from fdscale.models.eight_bit import KINDS
from fdscale.models.frozen import Forward, Parts, Teacher, built_for, dry_run, short
from fdscale.models.layers import pair

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STRIDES = ("stride4", "stride8", "stride16", "stride32")
RANDOM_SEED = 0  # of random weights: every rank and every restart must get the same teacher
# arguments of timm.create_model that would download, or change what is computed here
RESERVED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
RESERVED |= {"features_only", "num_classes"}
OPENAI_ONLY = {"input_resolution", "context_length"}  # entries of OpenAI's CLIP files that no other CLIP file has


def load_teacher(
    source: str,
    *,
    weights: str | None,
    image_size: int | Sequence[int] | None = None,
    args: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    hold: str = "same",
    feature: str = "last",
    key: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    shapes_only: bool = False,
) -> Teacher:
    """Builds a frozen teacher on the CPU; move it with `.to(device)`.

    source: "timm:NAME", "fdscale:swin_v2", "fdscale:vit" or "python:MODULE:CALLABLE".
    weights: a local file (safetensors or torch); "random" for random weights on purpose (seed 0); "own" where a
        python: callable returns a network that has its weights already.
    image_size: the size the teacher works at, pixels: views are resized to it, and networks whose position embedding or
        windows depend on it are built for it (argument img_size). None: it takes the views as they are.
    args: constructor arguments. dtype: of matrix products, under autocast; Linear and Conv2d weights are held in it.
    hold: "int8" or "fp8" holds those of Linear in 8 bits (models/eight_bit.py).
    feature: "last", after the final norm; or "stride4" ... "stride32", the last map of that stride in pixels, without
        a norm (stride16 of a Swin is the official option PRED_FEAT_S3).
    key: entry of the weight file that holds the weights, where it has several (EsViT: "student").
    mean, std: of RGB in [0, 1]. None: what the weights were trained with, as timm or the python module says; else
        ImageNet's.
    shapes_only: on the meta device, without weights, whatever `weights` says: for planning. A python: teacher is built
        as it builds itself.

    Raises UserError for whatever does not fit together.
    """
    adapters = {"timm": _from_timm, "fdscale": _from_fdscale, "python": _from_python}
    kind, _, name = source.partition(":")
    if kind not in adapters or not name:
        raise UserError(
            f"teacher.source: {source!r}. Expected timm:NAME, fdscale:swin_v2, fdscale:vit or python:MODULE:CALLABLE."
        )
    if shapes_only:
        weights = "random"
    if not weights:
        raise UserError(
            f"teacher.weights is missing for {source}. Give a local weight file; nothing is downloaded. Random weights "
            "teach nothing and serve only to try things out: teacher.weights=random asks for them. A python: teacher "
            "that brings its weights along takes teacher.weights=own."
        )
    if weights == "own" and kind != "python":
        raise UserError(f"teacher.weights: `own` is for python: teachers; {source} needs a local weight file.")
    if dtype not in DTYPES:
        raise UserError(f"teacher.dtype: {dtype!r}. Expected one of {', '.join(DTYPES)}.")
    if hold not in ("same", *KINDS):
        raise UserError(f"teacher.hold: {hold!r}. Expected one of same, {', '.join(KINDS)}.")
    if feature not in ("last", *STRIDES):
        raise UserError(f"teacher.feature: {feature!r}. Expected one of last, {', '.join(STRIDES)}.")
    if (mean is None) != (std is None):
        raise UserError("teacher.mean and teacher.std must be given together.")
    size = pair(image_size) if image_size else None
    place = torch.device("meta") if shapes_only and kind != "python" else nullcontext()
    with torch.random.fork_rng(devices=[]), place:
        torch.manual_seed(RANDOM_SEED)
        parts = adapters[kind](name, weights, size, dict(args or {}), feature, key, mean, std)
    teacher = Teacher(parts, source, size, DTYPES[dtype], hold)
    if size is not None:
        teacher.grid(size)  # a size that the network refuses is an error now, not at the first step
    return teacher


# --- adapters: (name, weights, size, args, feature, key, mean, std) -> Parts -----------------------------------------


def _from_fdscale(name, weights, size, args, feature, key, mean, std) -> Parts:
    """A network of this project; its weights may be its own, official ones or a distilled student's."""
    if name not in BACKBONES:
        raise UserError(f"teacher.source: fdscale:{name} is unknown. Expected fdscale:swin_v2 or fdscale:vit.")
    if feature != "last" and name == "vit":
        raise UserError(f"teacher.feature: {feature} needs a network with stages; fdscale:vit has one map, `last`.")
    if size is not None:
        args.setdefault("img_size", size)
    try:
        filled = weights == "random" and torch.get_default_device().type != "meta"
        with torch.device("cpu" if filled else "meta"):  # no random numbers where weights come from a file
            network = getattr(importlib.import_module(f"fdscale.models.{name}"), BACKBONES[name])(**args)
    except TypeError as error:
        raise UserError(f"teacher.args do not fit fdscale:{name}: {error}.") from error
    if weights != "random":
        convert.load(network, convert.read(weights, key), copy=False)
    if feature == "last" and not any(place.startswith("norm.") for place in network.state_dict()):
        raise UserError(f"fdscale:{name} with teacher.args {args} has no final norm, so its features are not normed.")
    mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    mapped = weights != "random"
    if feature == "last":
        return Parts(network, _call, network.prefix, mean, std, network.width, network.grid, network.flops, mapped)
    return Parts(network, partial(_map_of_stride, stride=_stride(feature)), (), mean, std, mapped=mapped)


def _from_python(name, weights, size, args, feature, key, mean, std) -> Parts:
    """Any torch module: `CALLABLE(**args)` returns an nn.Module that maps normalised images (B, 3, H, W) to features.

    Its output is (B, L, C), tokens before the grid first, or (B, C, h, w); the final norm is done. Attributes it may
    have: `mean` and `std` of RGB in [0, 1] (else ImageNet's), `prefix` (kinds of tokens before the grid, else none),
    `width` (C, else found out), and a method `grid((H, W)) -> (h, w)`, needed where tokens are no square patches.
    """
    if feature != "last":
        raise UserError("teacher.feature: a python: callable chooses itself what is learnt; leave it at `last`.")
    module_name, _, attribute = name.partition(":")
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(
            f"teacher.source: python:{name} cannot be imported ({error}). Expected python:MODULE:CALLABLE with a "
            "module that is installed or on PYTHONPATH."
        ) from error
    network = build(**args)
    if not isinstance(network, nn.Module):
        raise UserError(f"python:{name} returned {type(network).__name__}; expected a torch.nn.Module.")
    network.eval()
    if weights not in ("own", "random"):
        _load_strictly(network, convert.read(weights, key), weights, f"python:{name}")
    prefix, width, grid = (getattr(network, what, None) for what in ("prefix", "width", "grid"))
    mean = mean or getattr(network, "mean", IMAGENET_MEAN)
    std = std or getattr(network, "std", IMAGENET_STD)
    return Parts(network, _call, tuple(prefix or ()), mean, std, width, grid)


def _from_timm(name, weights, size, args, feature, key, mean, std) -> Parts:
    """A network of timm, in timm's own names and with timm's own conversion of official checkpoints."""
    import timm

    arch, _, tag = name.partition(".")
    known = _timm_weights(name, arch, args)
    if mean is None:
        mean, std = _timm_normalisation(name, arch, known)
    if weights != "random":
        _check_quickgelu(name, arch, tag, args)
    if size is not None and any(cfg.fixed_input_size for cfg in known.values()):
        args.setdefault("img_size", size)
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, **args).eval()
    except Exception as error:  # constructors object to arguments in many ways
        raise UserError(f"timm:{name} cannot be built with teacher.args {args}: {short(error)}.") from error
    if weights != "random":
        _load_timm(network, convert.read(weights, key), weights, name, arch)
    if feature == "last":
        forward: Forward = partial(_timm_last, norm=_timm_final_norm(network, name))
        return Parts(network, forward, _timm_prefix(network, name), mean, std)
    strides = [stage["reduction"] for stage in getattr(network, "feature_info", ())]
    if len(set(strides)) < 2 or _stride(feature) not in strides:
        raise UserError(f"teacher.feature: timm:{name} has no map of {feature}, only strides {sorted(set(strides))}.")
    index = len(strides) - 1 - strides[::-1].index(_stride(feature))
    return Parts(network, partial(_timm_map, index=index), (), mean, std)


# --- what a network computes: (network, images) -> tokens or map -----------------------------------------------------


def _call(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


def _map_of_stride(network: Any, images: Tensor, stride: int) -> Tensor:
    return next(m for m in network.maps(images) if images.shape[-1] == stride * m.shape[-1])


def _timm_last(network: Any, images: Tensor, norm: str | None) -> Tensor:
    output = network.forward_features(images)
    if norm is not None:
        output = network.get_submodule(norm)(output)
    if output.ndim == 4 and getattr(network, "output_fmt", "NCHW") == "NHWC":
        output = output.permute(0, 3, 1, 2)
    return output


def _timm_map(network: Any, images: Tensor, index: int) -> Tensor:
    options = {"norm": False, "output_fmt": "NCHW", "intermediates_only": True, "stop_early": True}
    return network.forward_intermediates(images, indices=[index], **options)[0]


def _stride(feature: str) -> int:
    return int(feature.removeprefix("stride"))


# --- timm -------------------------------------------------------------------------------------------------------------


def _timm_weights(name: str, arch: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """timm's descriptions of the weights it knows for this architecture, by "arch.tag", after checking the name."""
    import timm

    reserved = sorted(RESERVED & set(args))
    if reserved:
        raise UserError(f"teacher.args: {', '.join(reserved)} cannot be set; weights come from teacher.weights alone.")
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), 3)
        advice = f"Did you mean {', '.join(near)}?" if near else "timm.list_models() lists them."
        raise UserError(f"teacher.source: timm has no model {arch!r}. {advice}")
    if "flexi" in arch or "radio" in arch:
        raise UserError(f"timm:{name} resizes its position embedding in its own way; wrap it as a python: teacher.")
    known = timm.models.get_arch_pretrained_cfgs(arch)
    if "." in name and name not in known:
        raise UserError(f"teacher.source: timm knows no weights {name!r}. Known: {', '.join(known) or 'none'}.")
    return known


def _timm_normalisation(name: str, arch: str, known: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of the named weights; without a tag, only where all weights of the architecture agree."""
    meant = [known[name]] if name in known else known.values()
    normalisations = {(tuple(cfg.mean), tuple(cfg.std)) for cfg in meant}
    if len(normalisations) == 1:
        return normalisations.pop()
    if not normalisations:
        raise UserError(f"timm does not say how images are normalised for {name}: give teacher.mean and teacher.std.")
    raise UserError(
        f"timm:{arch} exists with weights that normalise images differently, so the tag of yours must be named: "
        f"{', '.join(known)}. Or give teacher.mean and teacher.std."
    )


def _check_quickgelu(name: str, arch: str, tag: str, args: Mapping[str, Any]) -> None:
    """OpenAI's CLIP and others use x * sigmoid(1.702 x); in a network with plain GELU they load and are wrong."""
    import timm

    if "_clip_" not in arch or "quickgelu" in arch or "act_layer" in args:
        return
    sibling = arch.replace("_clip_", "_clip_quickgelu_")
    quick = timm.models.get_arch_pretrained_cfgs(sibling)
    if f"{sibling}.{tag}" in quick:
        raise UserError(
            f"timm:{name} computes GELU, but the weights `{tag}` were trained with QuickGELU. Use timm:{sibling}.{tag}."
        )
    if quick and not tag:
        raise UserError(
            f"timm:{name} computes GELU; some CLIP weights need QuickGELU and the file does not tell. Name the "
            f"weights: timm:{sibling}.openai for OpenAI's, or timm:{arch}.TAG with the tag of yours."
        )


def _load_timm(network: Any, state: dict[str, Tensor], path: str, name: str, arch: str) -> None:
    import timm

    if OPENAI_ONLY & state.keys() and "quickgelu" not in arch:
        raise UserError(
            f"{path} is one of OpenAI's CLIP files, trained with QuickGELU, which timm:{name} does not compute. Use "
            f"the fitting one of {', '.join(timm.list_models('*clip_quickgelu*'))}, with the tag openai."
        )
    if any(n.startswith("backbone.") for n in state):  # DINO and EsViT wrap the backbone beside its projection head
        state = {n.removeprefix("backbone."): tensor for n, tensor in state.items()}
    to_timm = getattr(sys.modules[timm.models.model_entrypoint(arch).__module__], "checkpoint_filter_fn", None)
    if to_timm is not None:
        adapts = "adapt_layer_scale" in inspect.signature(to_timm).parameters  # names of DeiT III
        try:
            state = to_timm(state, network, **({"adapt_layer_scale": True} if adapts else {}))
        except Exception as error:  # it goes by names and shapes, and stumbles over foreign files in many ways
            raise UserError(f"{path} does not fit timm:{name} ({short(error)}).") from error
    classifier = network.pretrained_cfg.get("classifier") or ()
    heads = {"head", "head_dist", "head_dense", *([classifier] if isinstance(classifier, str) else classifier)}
    # not needed for features: classifiers, projection heads (CLIP's `proj` too), the token of masked training
    spare = rf"({'|'.join(sorted(map(re.escape, heads)))})\..*|mask_token"
    _load_strictly(network, state, path, f"timm:{name}", spare)


def _timm_final_norm(network: nn.Module, name: str) -> str | None:
    """Name of the final norm that is still to be applied after `forward_features`; None if that runs it itself.

    timm has it at `norm`, or, meant for pooled features, at `fc_norm` (then `norm` is Identity) or `head.norm`.
    Convolutional networks with BatchNorm have none and need none.
    """
    found: dict[str, Any] = {place: _submodule(network, place) for place in ("norm", "fc_norm", "head.norm")}
    norms = [place for place, module in found.items() if "norm" in type(module).__name__.lower()]
    ran: list[str] = []
    marks = [found[place].register_forward_hook(lambda *_, place=place: ran.append(place)) for place in norms]
    try:
        shape, _ = dry_run(network, partial(_timm_last, norm=None), built_for(network))
    except Exception as error:
        raise UserError(f"timm:{name} cannot be a teacher ({short(error)}). Wrap it as a python: teacher.") from error
    finally:
        for mark in marks:
            mark.remove()
    if norms:
        return None if norms[0] in ran else norms[0]
    if len(shape) == 4 and any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return None
    raise UserError(
        f"timm:{name}: there is no final norm at norm, fc_norm or head.norm, so it is not clear what its features are. "
        "Choose another global_pool in teacher.args, or wrap the network as a python: teacher."
    )


def _timm_prefix(network: nn.Module, name: str) -> tuple[str, ...]:
    """Kinds of timm's prefix tokens: class token, distillation token, registers, in this order."""
    tokens = {kind: getattr(network, f"{kind}_token", None) for kind in ("cls", "dist", "reg")}
    counts = {kind: 0 if token is None else token.shape[1] for kind, token in tokens.items()}  # token: (1, n, C)
    prefix = tuple(kind for kind, count in counts.items() for _ in range(count))
    expected = getattr(network, "num_prefix_tokens", 0)
    if len(prefix) != expected:
        raise UserError(
            f"timm:{name} has {expected} tokens before the grid; those known are {prefix or 'none'}. Wrap it as a "
            "python: teacher with an attribute `prefix`."
        )
    return prefix


def _submodule(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


# --- loading ----------------------------------------------------------------------------------------------------------


def _load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: str, name: str, spare: str = r"(?!)") -> None:
    """Fills every parameter and buffer, or raises UserError with the differences.

    spare: pattern of names in the file that may stay unused. BatchNorm's batch counter may be missing: eval ignores it.
    """
    own = network.state_dict()
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unused = [n for n in state if n not in own and not re.fullmatch(spare, n)]
    differing = [
        f"{n} (file {tuple(state[n].shape)}, network {tuple(own[n].shape)})"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    if missing or unused or differing:
        raise UserError(
            f"{path} does not fit {name}, which has {len(own)} tensors:\n"
            + _listed("missing in the file", missing)
            + _listed("of another shape", differing)
            + _listed("in the file but not in the network", unused)
            + "Check teacher.source, teacher.args and teacher.image_size against how the weights were trained."
        )
    network.load_state_dict({n: state[n] for n in own if n in state}, strict=False)  # all compared above


def _listed(title: str, names: Sequence[str]) -> str:
    more = f", ... ({len(names) - 6} more)" if len(names) > 6 else ""
    return f"  {len(names)} {title}: {', '.join(names[:6])}{more}\n" if names else ""
