"""Run by test_state.py under torchrun: train, take the state, put it into a new engine, train on; for every ZeRO stage.

The same state is also saved while training goes on. Prints one JSON line per configuration and rank: whether losses,
norms and all state are bitwise those of never having stopped, and whether the checkpoint holds the state of its step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fdscale import config, dist
from fdscale.engine import checkpoint, ema, state
from fdscale.engine import initialize as init
from fdscale.engine.optim import param_groups
from fdscale.engine.room import open_room
from fdscale.engine.saver import Saver
from fdscale.run import Run

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
DECAY = 0.8  # of the average of the weights
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
HPZ = {"stage3_param_persistence_threshold": 0}  # so that all parameters are partitioned, and partitioned twice
CASES = {
    **{f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in (0, 1, 2, 3)},
    **{f"zero{stage}-bf16": {"zero_optimization": {"stage": stage}, **BF16} for stage in (1, 2, 3)},
    "zero3-bf16-offload": {"zero_optimization": {"stage": 3, **OFFLOAD}, **BF16},
    "zero3-bf16-offload-all": {
        "zero_optimization": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}},
        **BF16,
    },
    "zero3-hpz2": {"zero_optimization": {"stage": 3, **HPZ, "zero_hpz_partition_size": 2}},
    "zero3-bf16-hpz2": {"zero_optimization": {"stage": 3, **HPZ, "zero_hpz_partition_size": 2}, **BF16},
    "zero0-apex": {"zero_optimization": {"stage": 0}},
    "zero2-apex": {"zero_optimization": {"stage": 2}},
    "zero3-partitioned": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


class Toy(nn.Module):
    """Odd sizes, so that partitions end in the middle of parameters and are padded; one parameter is frozen."""

    depths = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n, self.c = nn.Linear(7, 13), nn.Linear(13, 11), nn.LayerNorm(11), nn.Linear(11, 3)
        self.scale = nn.Parameter(torch.empty(5, 7), requires_grad=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x * self.scale.sum(0)
        return ((self.c(self.n(self.b(torch.relu(self.a(x))))).float() - y) ** 2).mean()

    def no_decay(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.ndim < 2}

    def depth_of(self, name: str) -> int:
        return "abnc".index(name[0])


def averaged() -> dict[str, torch.Tensor]:
    """torch's own average of the weights after the same six steps in a plain loop."""
    module = Toy()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(first_value(name, parameter.shape))
    groups = param_groups(module, lr=1e-2, weight_decay=0.05, layer_decay=0.8)
    optimizer = torch.optim.AdamW(groups, eps=1e-8)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    average.update_parameters(module)  # the first call copies
    for step in range(6):
        loss = module(*batch(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        average.update_parameters(module)
    return {name: p.detach() for name, p in average.module.named_parameters() if p.requires_grad}


def first_value(name: str, shape: torch.Size) -> torch.Tensor:
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


class ApexLike(torch.optim.Optimizer):
    """Where apex's FusedAdam keeps things: the number of updates in the group, the moments in the parameter's state.

    apex itself needs a GPU; this stand-in only shows that its layout is read and written.
    """

    def __init__(self, params: list, betas: tuple, eps: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (one, two), count = group["betas"], group["step"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["exp_avg"].mul_(one).add_(p.grad, alpha=1 - one)
                state["exp_avg_sq"].mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
                root = (state["exp_avg_sq"] / (1 - two**count)).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(state["exp_avg"] / (1 - one**count) / root * group["lr"])


ApexLike.__module__ = "apex.optimizers"
# Before DeepSpeed is imported, which looks for apex then, and never again.
for name in ("apex", "apex.optimizers", "amp_C"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["apex"].optimizers = sys.modules["apex.optimizers"]
sys.modules["apex.optimizers"].FusedAdam = ApexLike


def make(ds: dict, apex: bool = False, shift: float = 0.0) -> object:
    """An engine; shift: other first values, so that only what is written into it makes it go on alike."""
    with torch.device("meta"):
        module = Toy()
    if "deepspeed" in sys.modules:  # it makes the groups of hpZ once for a process, which has one engine outside tests
        sys.modules["deepspeed"].utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    sizes = {"batch_size": 16, "micro_batch": 4, "fused": "apex" if apex else "torch"}
    adam = {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "clip_grad": 0.5, "layer_decay": 0.8}
    return init.initialize(
        module, lambda name, shape: first_value(name, shape) + shift, ds, **sizes, **adam, average=DECAY
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 7, generator=generator), torch.randn(16, 3, generator=generator)


def steps(engine: object, first: int, last: int, saver: Saver | None = None) -> list[float]:
    """Losses and norms of some steps; the batch of a step does not depend on the number of ranks."""
    seen = []
    dtype = next(engine.module.parameters()).dtype
    for step in range(first, last):
        x, y = batch(step)
        x, y = x[dist.rank() :: dist.world()], y[dist.rank() :: dist.world()]
        for i in range(0, x.shape[0], 4):
            loss = engine(x[i : i + 4].to(dtype), y[i : i + 4])
            engine.backward(loss)
            if saver is not None and engine.is_gradient_accumulation_boundary():
                saver.before_update()
            engine.step()
            seen.append(loss.item())
        seen.append(float(engine.get_global_grad_norm()))
    return seen


def snapshot(engine: object) -> dict[tuple[str, int, str], torch.Tensor]:
    return {(part.name, part.start, key): v.clone() for part, values in state.read(engine) for key, v in values.items()}


def save(engine: object, folder: Path) -> Saver:
    """Begin to save, with a copy that would come too late if the next update did not wait for it."""
    saver = Saver(engine, open_room(folder, "token"), Run(folder, config.load("demo")), {})
    copy = saver._snapshot.finish
    saver._snapshot.finish = lambda: (time.sleep(0.1), copy())
    saver.begin(3, 48)
    return saver


def swapped(engine: object) -> list[bool]:
    """Whether the average computes something else, the weights come back, and so does all state, bitwise."""
    dtype = next(engine.module.parameters()).dtype
    x, y = batch(9)

    def loss() -> float:
        with torch.no_grad():
            return engine(x.to(dtype), y).item()

    before, own = snapshot(engine), loss()
    with ema.in_place_of_weights(engine):
        other, inside = loss(), snapshot(engine)
    after = snapshot(engine)
    return [
        own == loss(),
        own != other,
        all(torch.equal(before[key], after[key]) for key in before),
        all(torch.equal(before[n, i, "fp32"], inside[n, i, "ema"]) for n, i, key in before if key == "ema"),
    ]


def furthest(pieces: dict[tuple[str, int, str], torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of the averages from those wanted."""
    found = {key: value for part in dist.gather(pieces) for key, value in part.items() if key[2] == "ema"}
    assert {name for name, _, _ in found} == wanted.keys()
    return max(
        (value - wanted[name].flatten()[start : start + len(value)]).abs().max().item()
        for (name, start, _), value in found.items()
    )


def main() -> None:
    dist.init()
    folder = Path(dist.gather(tempfile.mkdtemp())[0])
    wanted = averaged()
    for name in sys.argv[1:] or CASES:
        engine = make(CASES[name], apex=name.endswith("apex"))
        head = steps(engine, 0, 3)
        taken, updates = snapshot(engine), state.optimizer_step(engine)
        saver = save(engine, folder / name)
        rest, final = steps(engine, 3, 6, saver), snapshot(engine)
        saver.finish()
        reader = checkpoint.Reader(folder / name / "step-00000003")
        everything = {key: value for part in dist.gather(taken) for key, value in part.items()}
        fresh = make(CASES[name], apex=name.endswith("apex"), shift=1.0)
        state.write(fresh, lambda part, key, all_=everything: all_[part.name, part.start, key], updates)
        again, refinal = steps(fresh, 3, 6), snapshot(fresh)
        covered = {}
        for (parameter, start, _), value in everything.items():
            covered.setdefault(parameter, {})[start] = value.numel()
        sizes = {n: int(torch.Size(s).numel()) for n, s in state.names_and_shapes(engine).items()}
        result = {
            "case": name,
            "rank": dist.rank(),
            "losses": rest == again,
            "state": final.keys() == refinal.keys() and all(torch.equal(final[key], refinal[key]) for key in final),
            "covered": {n: sum(parts.values()) for n, parts in covered.items()} == sizes,
            "saved": all(
                torch.equal(reader.full(parameter, key).flatten()[start : start + len(value)], value)
                for (parameter, start, key), value in everything.items()
            ),
            "updates": updates if updates == reader.state["optimizer_step"] else None,
            "swapped": swapped(fresh),
            "average": furthest(refinal, wanted),
            "norms": [head[-1], rest[-1]],
        }
        print("\n" + json.dumps(result), flush=True)
    dist.gather(None)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
