"""One rank's half of a batch through a batch-norm, forward and back: of tests/tasks/test_upernet.py, by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fdscale import dist
from fdscale.tasks.batch_norm import BatchNorm

dist.init()
half = slice(2 * dist.rank(), 2 * dist.rank() + 2)
x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(1))[half].requires_grad_()
norm = BatchNorm(3)
y = norm(x)
(y**3).sum().backward()
found = {"y": y.detach(), "gradient": x.grad, **norm.state_dict()}
torch.save(found, Path(sys.argv[1]) / f"{dist.rank()}.pt")
dist.close()
