"""The shipped job scripts and `fdscale submit` on a real Slurm: limits, lost nodes, arrays, dependencies, fencing."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT
from test_resume import losses

from slurm.cluster import Cluster, missing, wait_for
from slurm.jobs import STEPS, Jobs

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
if missing():
    pytest.skip(f"no Slurm for tests here: {missing()}", allow_module_level=True)


def test_a_run_survives_the_cluster(cluster: Cluster, jobs: Jobs) -> None:
    """Time limit, a lost node, scancel: in the end equal to the last bit to a run left alone."""
    run = "run"
    job = jobs.submit(run, options=("--sbatch", "--signal=B:USR1@600"))
    shutil.rmtree(jobs.source)  # edits after submitting, at the worst: the job has its own copy
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(jobs.leave_alone, "alone")
        jobs.train_on(run)
        assert cluster.job(job)["TimeLimit"] == "01:00:00"
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=9")  # less than 600 s are left
        cluster.wait(job, "PENDING", restarts=1)
        alone.result()
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert jobs.saved(run) == jobs.step(run) < STEPS, "the step at which it stopped is saved"
    assert "USR1: saving, then stopping" in jobs.log(run, job)
    assert "the ranks ended with codes 75 " in jobs.log(run, job)
    cluster.wait(job, "RUNNING", restarts=1)

    jobs.train_on(run)
    cluster.kill_node(2)
    cluster.wait(job, "PENDING", restarts=2)
    cluster.start_node(2)
    cluster.wait(job, "RUNNING", restarts=2)
    jobs.train_on(run)

    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED")
    assert cluster.job(job)["Restarts"] == "2"
    assert jobs.saved(run) == jobs.step(run) < STEPS
    assert "stopped from outside, and not requeued from here" in jobs.log(run, job)

    shutil.copytree(ROOT / "fdscale", jobs.source / "fdscale")
    shutil.copytree(ROOT / "slurm", jobs.source / "slurm")
    jobs.let_go(run)
    last = jobs.submit(run)
    cluster.wait(last, "COMPLETED")
    jobs.assert_same("alone", run)
    starts = jobs.starts(run)
    again = sum(int(cluster.job(name)["Restarts"]) for name in (job, last))  # a slow machine's Slurm may lose a node
    assert again >= 2
    assert [start.get("from_step") == 0 for start in starts] == [True, *[False] * (again + 1)], jobs.log(run, last)
    assert {Path(start["command"][0]) for start in starts} == {
        jobs.folder / run / "slurm" / f"submit-{number:03d}" / "fdscale" / "cli.py" for number in (1, 2)
    }


def test_an_array_and_what_is_not_worth_another_start(cluster: Cluster, jobs: Jobs) -> None:
    """One line of an array is done, one has a mistake, one breaks at every start; what depends on all never starts."""
    (jobs.folder / "lines").write_text(
        "data.seed=1 schedule.steps=4\nteacher.source=python:patient:Absent\nteacher.source=python:patient:Broken\n"
    )
    run = "an array"  # spaces are for trouble
    jobs.let_go(run)
    array = jobs.submit(run, options=("--array", "lines"), nodes=1, FDSCALE_FRUITLESS_RESTARTS="1")
    jobs.let_go("then")
    then = jobs.submit("then", "schedule.steps=4", options=("--after", f"{array}_0"), nodes=1)
    never = jobs.submit("never", options=("--after", array))
    assert cluster.job(then)["Reason"] == "Dependency"
    tasks = [f"{array}_{number}" for number in range(3)]
    for task in tasks:
        cluster.wait(task, "COMPLETED", "FAILED")
    assert [cluster.job(task)["JobState"] for task in tasks] == ["COMPLETED", "FAILED", "FAILED"]
    assert [cluster.job(task)["Restarts"] for task in tasks] == ["0", "0", "1"], "the last one restarts itself alone"
    assert [cluster.job(task)["ExitCode"] for task in tasks] == ["0:0", "2:0", "1:0"]
    assert "seed: 1" in (jobs.folder / run / "0/config.yaml").read_text()
    assert max(losses(jobs.folder / run / "0")) == 4
    log = jobs.log(run, tasks[2])
    assert "gave up: 1 restarts in a row made no checkpoint newer than none" in log
    rank = jobs.folder / run / "2/slurm" / f"job-{tasks[2]}" / "rank-00000.log"
    assert rank.read_text().count("AssertionError: broken on purpose") == 2, "the log of the first start is kept"
    cluster.wait(then, "COMPLETED")
    cluster.wait(never, "CANCELLED")
    assert not (jobs.folder / "never/starts").exists()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="networks of nodes need root and iproute2")
def test_what_slurm_lost_sight_of_is_fenced(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs whose first node is lost to Slurm alone: its ranks live on, beside those of the requeued job.

    One run is of a single rank, which needs nobody and trains on; the network of its node is cut. Two are of two ranks
    at ZeRO 3: one loses the network of the node with its rank 0 and its script, the other this node's slurmd.
    """
    with (
        Cluster(tmp_path_factory.mktemp("slurm"), nodes=8, networks=True, kill_wait_s=5) as cluster,
        ThreadPoolExecutor() as pool,
    ):
        jobs = Jobs(cluster, shards, tmp_path_factory.mktemp("jobs"))
        ranks = {"single": 1, "cut": 2, "lost": 2}
        exclusive = ("--sbatch", "--exclusive")
        ids = {run: jobs.submit(run, options=exclusive, nodes=n, PATIENT_S=str(n)) for run, n in ranks.items()}
        jobs.train_on(*ranks)
        alone = [pool.submit(jobs.leave_alone, f"alone-{n}", n) for n in (1, 2)]
        nodes = {run: int(cluster.job(ids[run])["BatchHost"].removeprefix("node")) for run in ranks}
        stale = cluster.ranks()
        cluster.cut(nodes["single"])
        cluster.cut(nodes["cut"])
        cluster.kill_node(nodes["lost"], tasks=False)
        jobs.train_on("single")
        saved = {run: jobs.saved(run) for run in ranks}
        assert all(len(jobs.starts(run)) == 1 for run in ranks), "Slurm takes longer to notice"

        for run in ranks:
            cluster.wait(ids[run], "PENDING", "RUNNING", restarts=1)
        wait_for(lambda: all(len(jobs.starts(run)) == 2 for run in ranks), cluster.report)
        jobs.train_on(*ranks)
        fenced = lambda: [jobs.starts(run)[0].get("ended", {}).get("code") == 76 for run in ("single", "cut")]  # noqa: E731
        wait_for(lambda: all(fenced()), cluster.report)  # by themselves, still cut off
        cluster.heal(nodes["single"])
        cluster.heal(nodes["cut"])
        cluster.run("scontrol", "reconfigure")  # Slurm looks at its nodes now
        wait_for(lambda: not set(stale) & set(cluster.ranks()), cluster.report)
        jobs.train_on("cut")
        for run in ranks:
            jobs.let_go(run)
        for run in ranks:
            cluster.wait(ids[run], "COMPLETED")
        for one in alone:
            one.result()

        for run, n in ranks.items():
            assert cluster.job(ids[run])["Restarts"] == "1", "what was left of the first start requeued nothing"
            first, second = jobs.starts(run)
            assert first["host"] == f"node{nodes[run]}" != second["host"]
            assert saved[run] <= second["from_step"]
            jobs.assert_same(f"alone-{n}", run, n)
        assert "not requeued from here" in jobs.log("lost", ids["lost"])
