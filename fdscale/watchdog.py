"""The watchdog: a run that hangs says which rank is late, and at what, and ends, so that a requeue can go on.

Every rank notes what it begins; a thread beside it sees whether that takes longer than it may. Ranks make the same
notes in the same order, so the one with the fewest is the one that the others wait for; of equals, one that is not
inside a collective. They compare in the store over which they found each other, without a collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fdscale import dist

HUNG = 74  # exit code, see docs/running.md
SLACK = 5  # times the limit of a step: a start with its first step, an evaluation, a rollback, the last save
GRACE_S = 15.0  # for the other ranks to answer, or a file system to take the stacks
TICK_S = 5.0  # most between two looks
COLLECTIVES = (os.path.join("torch", "distributed", ""), os.path.join("deepspeed", "comm", ""))


class Place(NamedTuple):
    """Where a rank is."""

    notes: int  # up to now
    period: int  # things with a limit of their own up to now
    allowed_s: float
    name: str  # such as step 17
    phase: str  # such as forward


class Answer(NamedTuple):
    """What a rank tells the others; in order, those that keep the others waiting come first."""

    notes: int
    waits: bool  # for others, in a collective
    text: str


class Watchdog:
    """Looks after the thread that made it, from `start` to `stop`; limit_s: for a step, 0: none.

    end(code, why) is called before the process ends with code 74.
    """

    def __init__(self, limit_s: float, directory: Path, end: Callable[[int, str], None]):
        self._limit_s, self._directory, self._end = limit_s, directory, end
        self._place = Place(0, 0, SLACK * limit_s, "start", "")
        self._watched = threading.get_ident()
        self._ended = threading.Event()
        self._store: Any = None
        self._looking: threading.Thread | None = None
        self._asking: threading.Thread | None = None
        self._called = False  # whether another rank has given up
        self._tick_s = min(limit_s / 20, TICK_S)

    def begin(self, name: str, slack: float = 1) -> None:
        """Something begins that may take so many times the limit of a step."""
        before = self._place
        self._place = Place(before.notes + 1, before.period + 1, slack * self._limit_s, name, "")

    def again(self) -> None:
        """What was begun made progress: its limit counts from here."""
        self.begin(self._place.name, SLACK)

    def at(self, phase: str) -> None:
        """The next part of it begins. All ranks must note the same."""
        before = self._place
        self._place = before._replace(notes=before.notes + 1, phase=phase)

    def start(self) -> None:
        """Begin to look; the process group must be there."""
        if self._limit_s:
            self._store = dist.store()
            self._looking = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._looking.start()

    def stop(self) -> None:
        """Look no more. Does not return where it is giving up: the process ends with its code and its word."""
        self._ended.set()
        if self._looking is not None:  # the interpreter must not end under them
            self._looking.join(4 * GRACE_S)  # giving up takes three parts of at most GRACE_S
        if self._asking is not None:
            self._asking.join(GRACE_S)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        spent_s, last_s, period = 0.0, time.monotonic(), self._place.period
        while not self._ended.wait(self._tick_s):
            # The stacks of a process in which no Python thread gets to run, such as this one, go to its log.
            log = sys.__stderr__ or sys.stderr
            if log is not None:
                faulthandler.dump_traceback_later(self._limit_s + SLACK * self._tick_s, file=log)
            place, now_s = self._place, time.monotonic()
            # A process that was stopped as a whole, say by Slurm for another job, did not hang.
            spent_s = 0.0 if place.period != period else spent_s + min(now_s - last_s, 2 * self._tick_s)
            last_s, period = now_s, place.period
            if spent_s > place.allowed_s or self._others_gave_up():
                self._give_up()

    def _others_gave_up(self) -> bool:
        if self._store is not None and (self._asking is None or not self._asking.is_alive()):
            self._asking = threading.Thread(target=self._ask, daemon=True)  # the store may not answer
            self._asking.start()
        return self._called

    def _ask(self) -> None:
        with contextlib.suppress(RuntimeError):  # rank 0 is gone; whoever waits for it finds out
            self._called = self._store.check(["arrived"])

    # -- giving up -----------------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        """Stacks to a file, the late rank to all, and out."""
        place = self._place
        where = f"{place.name}: {place.phase}" if place.phase else place.name
        mine = Answer(place.notes, self._in_a_collective(), f"rank {dist.rank()} on {os.uname().nodename} at {where}")
        _bounded(lambda: self._dump(mine))
        limit = f"longer than {place.allowed_s:g} s (guard.step_limit_s is {self._limit_s:g})"
        if self._store is None:
            why = verdict({0: mine}, 1)
        else:
            why = (
                _bounded(lambda: self._meet(mine))
                or f"Rank 0, where ranks find each other, does not answer; {mine.text}"
            )
        text = f"hung: {place.name} takes {limit}. {why}. Stacks: {self._directory}/stacks-*.log"
        with contextlib.suppress(OSError):  # where standard error is closed
            os.write(2, f"\nfdscale: {text}\n".encode())
        _bounded(lambda: self._end(HUNG, text))
        os._exit(HUNG)

    def _in_a_collective(self) -> bool:
        frame = sys._current_frames().get(self._watched)
        while frame is not None:
            if any(part in frame.f_code.co_filename for part in COLLECTIVES):
                return True
            frame = frame.f_back
        return False

    def _dump(self, mine: Answer) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / f"stacks-{dist.rank()}.log").open("a") as file:
            file.write(f"{time.strftime('%F %T')} {mine.text}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if torch.cuda.is_available() and dist.world() > 1:  # the flight recorder, for `torchfrtrace`
            c10d: Any = torch._C._distributed_c10d
            trace = c10d._dump_nccl_trace()
            (self._directory / f"collectives-{dist.rank()}").write_bytes(trace)

    def _meet(self, mine: Answer) -> str:
        """The verdict, which the first to arrive gives; it waits for the answers of all."""
        store, world = self._store, dist.world()
        store.set(f"answer-{dist.rank()}", json.dumps(mine))
        first = store.add("arrived", 1) == 1
        deadline = time.monotonic() + GRACE_S - 2
        while time.monotonic() < deadline and not (store.add("arrived", 0) == world if first else _has(store)):
            time.sleep(0.05)
        if first:
            keys = {rank: f"answer-{rank}" for rank in range(world)}
            answers = {rank: Answer(*json.loads(store.get(key))) for rank, key in keys.items() if store.check([key])}
            store.set("verdict", verdict(answers, world))
        text = store.get("verdict").decode()
        store.add("heard", 1)
        while dist.rank() == 0 and store.add("heard", 0) < store.add("arrived", 0) and time.monotonic() < deadline + 1:
            time.sleep(0.05)  # the others read it from the store of this rank
        return text


def _has(store: Any) -> bool:
    return store.check(["verdict"])


def verdict(answers: dict[int, Answer], world: int) -> str:
    """Which ranks keep the others waiting, and at what; a rank that does not answer does."""
    silent = [rank for rank in range(world) if rank not in answers]
    if silent:
        names = ", ".join(map(str, silent))
        return f"Late: rank {names}, without an answer (stopped, lost, or inside a call that never returns)"
    first = min(answer[:2] for answer in answers.values())
    late = [answer.text for _, answer in sorted(answers.items()) if answer[:2] == first]
    others = sorted({answer.text.partition(" at ")[2] for answer in answers.values() if answer[:2] != first})
    if not others:
        return f"All ranks are at the same place: {late[0].partition(' at ')[2]}" if world > 1 else f"Late: {late[0]}"
    return f"Late: {', '.join(late)}; the others are at {', '.join(others)}"


def _bounded(work: Callable[[], Any]) -> Any:
    """What the work returns; None where it fails, or does not return in time."""
    done: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):  # nothing may keep the process from its end
            done.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(GRACE_S)
    return done[0] if done else None
