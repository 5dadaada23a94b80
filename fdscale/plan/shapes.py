"""The networks of a recipe on the meta device, and the bytes that a step of theirs keeps and needs.

Nothing is computed: the real modules run forward and backward on tensors that have a shape and no content, and every
storage is counted from when it comes into being until it goes.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdscale import assemble, config, student
from fdscale.engine import memory, sharding
from fdscale.engine.optim import param_groups
from fdscale.kernels import attention
from fdscale.models.teachers import Teacher


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that come into being under it and are still there: now, and at most."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}  # these do not count
        self._marks: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self._marks[key] = weakref.ref(storage, functools.partial(self._gone, key))

    def _gone(self, key: int, _: Any) -> None:
        self.now -= self._sizes.pop(key)
        del self._marks[key]


@contextmanager
def _gpu_attention() -> Iterator[None]:
    """torch's memory-efficient attention, which GPUs take for a bias with a gradient; other devices keep all scores.

    The function is replaced, since a mode of torch would not be on while a backward recomputes.
    """
    usual = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """As torch calls it: the bias is copied to rows of a multiple of 8, and stands for all images without a copy."""
    if attn_mask is not None:
        keys = attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask.to(q.dtype), (0, -keys % 8))[..., :keys].expand(*q.shape[:-1], keys)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, torch.is_grad_enabled())[0]


class Activations(NamedTuple):
    """Bytes on a GPU for one micro-batch."""

    kept: int  # from forward to backward
    peak: int  # at most, in forward or backward, what is kept included
    offloaded: int  # kept in host memory instead


class Networks:
    """Student, teachers and optimizer groups of a config, without content.

    gpu: count what GPUs keep: their kernels and their attention; else what a CPU does.
    """

    def __init__(self, settings: config.Config, gpu: bool = True) -> None:
        self.settings, self.gpu = settings, gpu
        self.teachers: dict[str, Teacher] = {}  # by name, as `config.teachers_of` has them; of a fine-tuning none
        if config.task_of(settings) == "distill":
            self.teachers = assemble.build_teachers(settings, shapes_only=True)
        for teacher in self.teachers.values():
            if teacher.is_ours:
                memory.compute_by(teacher.network, self.kernels, self.fused)
        self.module = self._module(settings)
        self.sizes = {name: parameter.numel() for name, parameter in self.module.named_parameters()}
        optim = settings.optim
        groups = param_groups(self.module, optim.lr, optim.weight_decay, optim.layer_decay)
        self.groups = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
        self._found: dict[Any, Any] = {}  # what was measured, for all memory sections

    @property
    def parameters(self) -> int:
        """Parameters that are trained, projector or head included."""
        return sum(self.sizes.values())

    @property
    def head_flops(self) -> int:
        """Multiply-adds of what stands behind the backbone, for one image: of a segmenter or detector; else about 0."""
        count = getattr(self.module, "head_flops", None)
        return count((self.settings.data.image_size,) * 2) if count is not None else 0

    @property
    def running(self) -> dict[str, Teacher]:
        """The teachers that compute in every step: none where their features are replayed."""
        return self.teachers if self.settings.cache.features is None else {}

    @property
    def kernels(self) -> str:
        """What is taken to compute window attention: what `memory.kernels` or the environment names.

        auto is triton on GPUs; cuda needs the same memory, and is planned as triton.
        """
        name, _ = attention.asked(self.settings.memory.kernels)
        return {"auto": "triton" if self.gpu else "reference", "cuda": "triton"}.get(name, name)

    @property
    def fused(self) -> bool:
        """Whether norms and loss are taken to be fused."""
        return self.gpu and self.kernels in attention.FASTEST

    def with_memory(self, settings: config.Config) -> Networks:
        """The same networks under another `memory` section."""
        other = object.__new__(Networks)
        other.__dict__.update(self.__dict__, settings=settings)
        return other

    def _module(self, settings: config.Config) -> Any:
        backbone, policy = student.backbone(settings), settings.memory
        alike = {"none": "none", "selective": "selective"}
        kinds = [alike.get(kind, "torch") for kind in policy.checkpoint]  # the others keep a block's inputs alone
        memory.apply(backbone, kinds, policy.attention_chunk, self.kernels, self.fused)
        if config.task_of(settings) != "distill":
            return student.build_labelled(settings, backbone)
        self.pairings, module = assemble.join(settings, backbone, self.teachers)
        module.fused = self.fused
        return module.to("meta")  # the buffers of phi_s

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Those of the module for one micro-batch, on the meta device: images, targets or masks, sample numbers."""
        count, size = self.settings.memory.micro_batch, self.settings.data.image_size
        images = torch.empty(count, 3, size, size, dtype=dtype, device="meta")
        numbers = torch.empty(count, dtype=torch.int64, device="meta")
        if config.task_of(self.settings) == "segment":
            return images, torch.empty(count, size, size, dtype=torch.uint8, device="meta"), numbers
        if config.task_of(self.settings) == "detect":
            return images, torch.empty(count, 2, dtype=torch.int64, device="meta")
        if not self.teachers:
            return images, torch.empty(count, self.settings.classify.classes or 0, device="meta"), numbers
        targets = tuple(
            torch.empty(count, self.pairings[name].tokens, teacher.width, device="meta")
            for name, teacher in self.teachers.items()
        )
        return images, targets[0] if len(targets) == 1 else targets, numbers

    def activations(self, dtype: torch.dtype) -> Activations:
        """Of a micro-batch under the `memory` section, for weights and images of this dtype."""
        policy = self.settings.memory
        key = (policy.micro_batch, policy.checkpoint, policy.attention_chunk, policy.kernels, dtype)
        if key not in self._found:
            module = self._module(self.settings).to(dtype).train()
            self._found[key] = _measure(module, self.arguments(dtype), self._offloaded(module), self.gpu)
        return self._found[key]

    def _offloaded(self, module: Any) -> list[nn.Module]:
        """Blocks whose inputs go to host memory."""
        kinds = memory.per_stage(self.settings.memory.checkpoint, module.backbone.depths, "memory.checkpoint")
        blocks = module.backbone.blocks()
        return [block for block, kind in zip(blocks, kinds, strict=True) if kind.endswith("_offload")]

    @functools.cached_property
    def teacher_bytes(self) -> dict[str, int]:
        """Of each teacher's parameters and buffers in its dtype, and of what whitens its features."""
        found = {}
        for name, teacher in self.teachers.items():
            tensors = [*teacher.network.parameters(), *teacher.network.buffers()]
            tensors += self.module.projectors[name].buffers()
            found[name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return found

    @functools.cached_property
    def teacher_blocks(self) -> dict[str, list[int]]:
        """Of each teacher, the bytes of each block's matrices, which `memory.teacher=sharded` shares out.

        Raises UserError where a teacher has no blocks.
        """
        return {
            name: [sum(p.numel() * p.element_size() for p in sharding.shared(block)) for block in teacher.blocks()]
            for name, teacher in self.teachers.items()
        }

    def teacher_peak(self) -> int | None:
        """At most alive in a teacher's forward of a micro-batch, as in float32: an upper bound for 16 bits.

        They run one after the other. None where one does not run on the meta device.
        """
        if not self.running:
            return 0
        if "teacher" not in self._found:
            self._found["teacher"] = [self._teacher_peaks(teacher) for teacher in self.teachers.values()]
        peaks, more = self._found["teacher"], self.settings.memory.micro_batch - 1
        return None if None in peaks else max(one + more * (two - one) for one, two in peaks)

    def _teacher_peaks(self, teacher: Teacher) -> list[int] | None:
        """For one image and for two. Images do not meet in a teacher: what it needs is linear in them."""
        size = teacher.image_size or (self.settings.data.image_size,) * 2
        peaks = []
        try:
            network, forward = teacher.without_content()
            for some in (1, 2):
                images = torch.empty(some, 3, *size, device="meta")
                live = Live([images, *network.parameters(), *network.buffers()])
                with live, _gpu_attention(), torch.no_grad():
                    forward(network, images)
                peaks.append(live.peak)
        except Exception:  # every network fails in its own way
            return None
        return peaks


def _measure(module: nn.Module, arguments: tuple[Tensor, ...], offloaded: list[nn.Module], gpu: bool) -> Activations:
    """Forward and backward of a module; gradients of parameters go as soon as they are there."""
    inputs: list[int] = []
    for block in offloaded:
        block.forward = functools.partial(_noting, inputs, block.forward)
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(_drop)
    live = Live([*module.parameters(), *module.buffers(), *tree_leaves(arguments)])
    with live, _gpu_attention() if gpu else nullcontext():
        loss = module(*arguments)
        kept, moved = live.now, sum(inputs)
        loss.backward()
    return Activations(kept - moved, live.peak - moved, moved)


def _noting(sizes: list[int], forward: Any, x: Tensor, *more: Any) -> Any:
    sizes.append(x.numel() * x.element_size())
    return forward(x, *more)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def with_policy(settings: config.Config, **policy: Any) -> config.Config:
    """A config with other keys of its `memory` section."""
    return dataclasses.replace(settings, memory=dataclasses.replace(settings.memory, **policy))
