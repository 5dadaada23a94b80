"""Workers against the death of the process that started them, at the worst moments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import ROOT

SCRIPT = """
import multiprocessing, os, signal, sys, time
sys.path.insert(0, {root!r})
from fdscale.data.parallel import die_with_parent

def work(parent, survived):
    while os.getppid() == parent:  # so that it is dead before this worker asks to die with it
        time.sleep(0.01)
    die_with_parent()
    open(survived, "w").close()

worker = multiprocessing.get_context("fork").Process(target=work, args=(os.getpid(), {survived!r}))
worker.start()
if os.fork() == 0:  # holds what its parent held, as a command does that was forked and has not begun
    while os.path.exists(f"/proc/{{worker.pid}}/cmdline") and open(f"/proc/{{worker.pid}}/cmdline").read():
        time.sleep(0.01)
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_though_its_parent_died_before_it_asked_and_another_holds_its_pipes(tmp_path: Path) -> None:
    survived = tmp_path / "survived"
    code = SCRIPT.format(root=str(ROOT), survived=str(survived))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -9, done.stderr  # and all three have closed their output
    assert not survived.exists()
