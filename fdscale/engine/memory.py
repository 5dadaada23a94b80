"""Memory policies, applied from outside to a backbone's `blocks()`: activation checkpointing, sequential self-attention
and what computes window attention and the norms behind branches.

A policy replaces a block's `forward`; names, parameters and the state dict stay as they are. What a block computes does
not change, since everything random in it (drop path) comes in as a tensor argument.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from fdscale import UserError, dist

COMPILES = ("none", "torch", "torch_offload", "deepspeed")  # kinds of checkpointing that go with torch.compile


def per_stage(values: Sequence[Any], depths: Sequence[int], key: str) -> list[Any]:
    """One value per block from one value for all or one per stage. Raises UserError naming the config key."""
    if len(values) not in (1, len(depths)):
        raise UserError(
            f"{key} has {len(values)} values; expected 1, or one for each of the {len(depths)} stages of this backbone"
        )
    expanded = list(values) * (len(depths) if len(values) == 1 else 1)
    return [value for value, depth in zip(expanded, depths, strict=True) for _ in range(depth)]


def apply(
    backbone: Any,
    checkpoint: Sequence[str] = ("none",),
    attention_chunk: Sequence[int] = (0,),
    kernels: str = "reference",
    fused: bool = False,
    compiled: bool = False,
) -> None:
    """Set all policies on every block.

    checkpoint: none | torch | torch_offload | selective | deepspeed | fairscale | fairscale_offload, for all blocks or
    per stage; all but the first keep a block's inputs alone, selective what came of its attention, too, and those that
    offload keep them in host memory. attention_chunk:
    windows (SwinV2) or heads (ViT) whose attention is computed at a time, each chunk recomputed in backward; 0: all.
    kernels: what computes window attention, a name of kernels.attention. fused: take the fused norms on a GPU.
    compiled: by torch.compile, each block as one graph. Raises UserError where a policy does not go with that.
    """
    kinds = per_stage(checkpoint, backbone.depths, "memory.checkpoint")
    chunks = per_stage(attention_chunk, backbone.depths, "memory.attention_chunk")
    for block, kind, chunk in zip(backbone.blocks(), kinds, chunks, strict=True):
        compute_by(block, kernels, fused)
        for module in block.modules():
            if hasattr(module, "attention_chunk"):
                module.attention_chunk = chunk
        if compiled:
            _compile(block, kind)
        if kind != "none":
            block.forward = _checkpointed(kind, block)


def compute_by(module: nn.Module, kernels: str, fused: bool) -> None:
    """Say what computes window attention in all parts of a module, and whether its norms behind branches are fused."""
    for part in module.modules():
        for name, value in (("kernels", kernels), ("fused", fused)):
            if hasattr(part, name):
                setattr(part, name, value)


def agree_on_kernels(module: nn.Module) -> None:
    """Where the ranks' kernels differ, as when one GPU fails its self-check, nobody takes any. A collective."""
    parts = [part for part in module.modules() if hasattr(part, "kernels") or hasattr(part, "fused")]
    mine = [(getattr(part, "kernels", None), getattr(part, "fused", None)) for part in parts]
    if any(theirs != mine for theirs in dist.gather(mine)):
        for part in parts:
            for name, plain in (("kernels", "reference"), ("fused", False)):
                if hasattr(part, name):
                    setattr(part, name, plain)


def _compile(block: nn.Module, kind: str) -> None:
    """Compile a block's forward, inside of its checkpointing; ZeRO 3 then gathers the block's weights at once."""
    if kind not in COMPILES:
        raise UserError(
            f"memory.compile names student, and memory.checkpoint {kind}, which does not go with that: it needs to see "
            f"the ops, or the class, of a block; take one of {', '.join(COMPILES)}"
        )
    # Blocks share their code, which is compiled anew for each width, shift and batch: more often than torch expects.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 512)
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")  # of constants
    block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    _gather_whole(block)


def _gather_whole(block: nn.Module) -> None:
    """Keep DeepSpeed from gathering the weights of a block's parts one by one, in the middle of a compiled graph."""
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

    set_z3_leaf_module(block, True)


def _checkpointed(kind: str, block: nn.Module) -> Callable[..., Any]:
    forward = block.forward
    if kind == "torch":
        # Nothing inside a block draws random numbers, so there is no generator state to stash.
        return functools.partial(torch_checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    if kind == "torch_offload":
        return functools.partial(_offloading, forward)
    if kind == "deepspeed":
        return functools.partial(_deepspeed_checkpoint, block, forward)
    if kind == "selective":
        kept = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
        return functools.partial(
            torch_checkpoint, forward, use_reentrant=False, preserve_rng_state=False, context_fn=kept
        )
    try:
        from fairscale.nn.checkpoint import checkpoint_wrapper
    except ImportError:
        raise UserError(
            "memory.checkpoint asks for fairscale, which is not installed: pip install 'fdscale[fairscale]', or "
            "choose torch"
        ) from None
    return checkpoint_wrapper(block, offload_to_cpu=kind == "fairscale_offload").forward


def _offloading(forward: Callable[..., Any], *args: Any) -> Any:
    """torch's reentrant checkpoint, since it alone keeps its inputs as saved tensors, which torch moves to the host."""
    if not torch.is_grad_enabled():
        return forward(*args)
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return torch_checkpoint(forward, *args, use_reentrant=True, preserve_rng_state=False)


def _keep_attention(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Attention as one op keeps its result and a number per query, and none of its scores."""
    name = getattr(getattr(op, "_schema", None), "name", "")
    one = name == "fdscale::window_attention" or name.startswith("aten::_scaled_dot_product_")
    return CheckpointPolicy.MUST_SAVE if one else CheckpointPolicy.PREFER_RECOMPUTE


def _deepspeed_checkpoint(block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """DeepSpeed's checkpoint is reentrant, so it stays out without gradients; it wants a process group."""
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args)
    from deepspeed import checkpointing

    if not checkpointing.is_configured():
        checkpointing.configure(mpu_=None)
    return checkpointing.checkpoint(forward, *args)
