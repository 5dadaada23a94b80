"""Memory policies against the plain backbone: the same loss and gradients, with less kept for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fdscale import UserError
from fdscale.engine import memory
from fdscale.engine.ds_config import check_checkpointing
from fdscale.models import backbone

SWIN = {
    "img_size": 64,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [1, 2],
    "window_size": 4,
    "pretrained_window_sizes": [0, 0],
}
VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
MODELS = [("swin_v2", SWIN, 2), ("vit", VIT, 1)]


def run(model: str, args: dict, **policy: Any) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients and bytes of what autograd keeps, with drop path on."""
    torch.manual_seed(0)
    student = backbone(model, {**args, "drop_path_rate": 0.4}).train()
    for parameter in student.parameters():  # zero post-norms would hide the branches
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    memory.apply(student, **policy)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = student(images, torch.arange(4)).square().mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize(("model", "args", "stages"), MODELS, ids=["swin_v2", "vit"])
@pytest.mark.parametrize("kind", ["torch", "torch_offload", "selective", "deepspeed", "fairscale", "fairscale_offload"])
def test_checkpointing_changes_memory_and_nothing_else(
    model: str, args: dict, stages: int, kind: str, process_group: None
) -> None:
    if kind == "deepspeed":
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    plain_loss, plain, plain_bytes = run(model, args)
    loss, gradients, kept_bytes = run(model, args, checkpoint=(kind,))
    assert loss == plain_loss
    for name, gradient in plain.items():
        assert torch.equal(gradients[name], gradient), name
    if kind == "torch":  # the others do not go through saved-tensor hooks
        assert kept_bytes < plain_bytes / 2


@pytest.mark.parametrize(("model", "args", "stages"), MODELS, ids=["swin_v2", "vit"])
def test_selective_checkpointing_does_not_attend_again(model: str, args: dict, stages: int) -> None:
    args = args if model == "swin_v2" else {**args, "position": "absolute"}  # a bias with a gradient has no op on a CPU
    counts, found = {}, {}
    for kind in ("none", "torch", "selective"):
        with Counted() as counted:
            found[kind] = run(model, args, checkpoint=(kind,), kernels="torch")
        counts[kind] = counted.forwards
        assert found[kind][0] == found["none"][0]
        for name, gradient in found["none"][1].items():
            assert torch.equal(found[kind][1][name], gradient), (kind, name)
    blocks = 4 if model == "swin_v2" else 3
    assert counts == {"none": blocks, "torch": 2 * blocks, "selective": blocks}


def test_selective_checkpointing_is_refused_at_stage_3() -> None:
    for stage in (0, 1, 2):
        check_checkpointing({"zero_optimization": {"stage": stage}}, ("selective",))
    check_checkpointing({"zero_optimization": {"stage": 3}}, ("none", "torch"))
    with pytest.raises(UserError, match=r"memory\.checkpoint is selective, which does not go with ZeRO 3"):
        check_checkpointing({"zero_optimization": {"stage": 3}}, ("none", "selective"))


class Counted(TorchDispatchMode):
    """Counts how often attention runs forward as one op."""

    forwards = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        attends = name == "fdscale::window_attention" or "_scaled_dot_product_" in name
        self.forwards += attends and "backward" not in name
        return func(*args, **(kwargs or {}))


def test_policies_are_selectable_per_stage() -> None:
    _, plain, all_bytes = run("swin_v2", SWIN)
    _, first, first_bytes = run("swin_v2", SWIN, checkpoint=("torch", "none"))
    _, second, second_bytes = run("swin_v2", SWIN, checkpoint=("none", "torch"))
    assert first_bytes < second_bytes < all_bytes  # stage 1 has four times the tokens at half the width
    for name, gradient in plain.items():
        assert torch.equal(first[name], gradient)
        assert torch.equal(second[name], gradient)


@pytest.mark.parametrize(("model", "args", "stages"), MODELS, ids=["swin_v2", "vit"])
def test_sequential_attention_equals_the_batched_form(model: str, args: dict, stages: int) -> None:
    plain_loss, plain, plain_bytes = run(model, args)
    loss, gradients, kept_bytes = run(model, args, attention_chunk=(1,) * stages)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-6), name
    assert kept_bytes < plain_bytes


def test_attention_in_tiles_keeps_less_for_the_backward() -> None:
    plain_loss, plain, plain_bytes = run("swin_v2", SWIN)
    loss, gradients, kept_bytes = run("swin_v2", SWIN, kernels="torch")
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-6), name
    assert kept_bytes < plain_bytes


def test_names_and_state_dict_stay() -> None:
    plain, wrapped = backbone("swin_v2", SWIN), backbone("swin_v2", SWIN)
    memory.apply(wrapped, checkpoint=("torch",), attention_chunk=(2, 0), kernels="torch")
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    assert [block.attn.attention_chunk for block in wrapped.blocks()] == [2, 2, 0, 0]
    assert {block.attn.kernels for block in wrapped.blocks()} == {"torch"}


def test_a_wrong_number_of_values_is_named() -> None:
    with pytest.raises(
        UserError, match=r"memory\.checkpoint has 3 values; expected 1, or one for each of the 2 stages"
    ):
        memory.apply(backbone("swin_v2", SWIN), checkpoint=("torch", "none", "none"))
