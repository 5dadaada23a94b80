"""Starts of a tiny distillation of a few steps on one or several ranks, and the same run left alone to compare with."""

from __future__ import annotations

import functools
import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from helpers import TINY, sets
from test_resume import losses, samples, tensors

from faults.zygote import Zygote, kill, ranks
from fdscale.engine import checkpoint

STEPS, EVERY = 6, 2
GRACE_S = 5.0  # that ranks have to find out by themselves that another is gone
SETTINGS = (f"schedule.steps={STEPS}", f"save.every={EVERY}", "save.keep=1")


class Starts:
    """Runs below one folder."""

    def __init__(self, zygote: Zygote, shards: Path, folder: Path):
        self.zygote, self.folder, self._shards = zygote, folder, shards
        self._count = 0

    def new(self) -> Path:
        """A run directory that does not exist yet."""
        self._count += 1
        return self.folder / f"run-{self._count:05d}"

    def begin(
        self,
        run: Path,
        env: Mapping[str, str] | None = None,
        world: int = 1,
        stage: int = 0,
        more: Sequence[str] = (),
        options: Sequence[str] = (),
        precision: Mapping[str, object] | None = None,
        only: int | None = None,
    ) -> list[int]:
        """Start it, or go on with it; the ranks' process numbers.

        env: such as a fault, of all ranks, or of the one that is given as `only`. more: settings.
        """
        ds = self.folder / f"zero{stage}.json"
        ds.write_text(json.dumps({"zero_optimization": {"stage": stage}, **(precision or {})}))
        words = [
            "distill",
            "demo",
            "--run",
            run,
            "--ds",
            ds,
            *sets(*TINY, f"data.shards={self._shards}", *SETTINGS, *more),
            *options,
        ]
        each = ranks(free_port(), world) if world > 1 else [{}]
        theirs = [dict(env or {}) if only in (None, rank) else {} for rank in range(world)]
        return [
            self.zygote.start(words, self.output(run), {**own, **its}) for own, its in zip(each, theirs, strict=True)
        ]

    def end(self, pids: list[int]) -> list[int]:
        """Their exit codes, when all have ended; as launchers do, the others are killed when one has died."""
        while not all(self.zygote.code(pid) is not None for pid in pids):
            if any(self.zygote.code(pid) for pid in pids):
                time.sleep(GRACE_S)
                kill_all([pid for pid in pids if self.zygote.code(pid) is None])
            time.sleep(0.005)
        return [self.zygote.wait(pid) for pid in pids]

    def run(
        self,
        run: Path,
        env: Mapping[str, str] | None = None,
        world: int = 1,
        stage: int = 0,
        more: Sequence[str] = (),
        options: Sequence[str] = (),
        precision: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Start and wait."""
        return self.end(self.begin(run, env, world, stage, more, options, precision))

    def output(self, run: Path) -> Path:
        """What its ranks printed, over all starts."""
        return run.with_suffix(".out")

    @functools.cache  # noqa: B019 - lives as long as the session
    def whole(self, world: int = 1, stage: int = 0) -> Path:
        """A run that nothing happened to, with all its checkpoints."""
        run = self.new()
        codes = self.run(run, world=world, stage=stage, more=("save.keep=9",))
        assert set(codes) == {0}, self.output(run).read_text()
        return run

    def same(self, run: Path, world: int = 1, stage: int = 0) -> None:
        """Assert that a finished run equals the one left alone to the last bit, and left nothing lying about."""
        whole, said = self.whole(world, stage), self.output(run).read_text()
        assert losses(run) == losses(whole), said
        assert sorted(losses(run)) == list(range(1, STEPS + 1)), said
        assert samples(run, world) == samples(whole, world), said
        a, b = tensors(whole, STEPS, world), tensors(run, STEPS, world)
        assert a, said
        assert a.keys() == b.keys(), said
        assert all(torch.equal(a[name], b[name]) for name in a), said
        assert "Traceback" not in said, said


def newest(run: Path) -> int:
    """The step of the newest valid checkpoint; 0 where there is none."""
    found, _ = checkpoint.newest_valid(run / "checkpoints")
    return int(found.name.removeprefix("step-")) if found is not None else 0


def trained(run: Path) -> int:
    """The last step that its log tells of."""
    log = run / "metrics.jsonl"
    return max(losses(run), default=0) if log.exists() else 0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_all(pids: list[int]) -> None:
    """kill -9 every rank."""
    for pid in pids:
        kill(pid)
