"""`fdscale submit` as far as it needs no Slurm (tests/slurm has the rest), and the job scripts' style."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, TINY, outside, sets

from fdscale import cli

SCRIPTS = sorted([*(ROOT / "slurm").glob("*.s*"), ROOT / ".ci" / "run"])


@pytest.fixture
def submit(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `fdscale submit` prints, of a tiny run for two ranks on each of two nodes."""

    def run(*words: str, code: int = 0) -> str:
        run = str(tmp_path / "run")
        tiny = sets(*TINY, f"data.shards={shards}", "memory.micro_batch=2")
        size = ["--nodes", "2", "--gpus-per-node", "2", "--time", "24:00:00"]
        assert cli.main(["submit", "demo", "--run", run, *size, *tiny, *words]) == code
        out = capsys.readouterr()
        return out.err if code else out.out

    return run


def test_a_dry_run_shows_the_job_and_writes_nothing(submit: Callable[..., str], tmp_path: Path) -> None:
    text = submit("--dry-run", "--partition", "a100", "--after", "17", "--sbatch", "--exclusive", "--comment=two words")
    head, body = text.split("\n\n", 1)
    given = [line.removeprefix("#SBATCH ") for line in head.splitlines() if line.startswith("#SBATCH")]
    for option in (
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=3", "--time=24:00:00",
        "--partition=a100", "--dependency=afterok:17", "--requeue", "--open-mode=append", "--signal=B:USR1@300",
        '--exclusive "--comment=two words"',
    ):  # fmt: skip
        assert given.count(option) == 1, option
    assert len({option.partition("=")[0] for option in given}) == len(given), "none given twice"
    assert "account" not in text
    assert "#SBATCH" not in body, "sbatch stops reading at the first command"
    assert f"FDSCALE_PYTHON={sys.executable}" in body
    assert not (tmp_path / "run").exists()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_other_verbs_have_their_own_script(submit: Callable[..., str], tmp_path: Path) -> None:
    classes = ("--set", "classify.classes=3")
    text = submit("--dry-run", "--verb", "finetune", "--after", "17", *classes)
    assert 'job.sh" finetune "$@"' in text
    assert "#SBATCH --dependency=afterok:17" in text
    (tmp_path / "zero1.json").write_text("{}")
    evaluate = ("--dry-run", "--verb", "evaluate", *classes, "--set", "data.heldout_shards=/data/val")
    assert f"config.yaml --run {tmp_path}/run\n" in submit(*evaluate)
    assert "--ds is for training" in submit(*evaluate, "--ds", str(tmp_path / "zero1.json"), code=2)


def test_an_array_runs_one_line_each(submit: Callable[..., str], tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("optim.lr=1e-3 data.seed=1\n\noptim.lr=2e-3\n")
    text = submit("--dry-run", "--array", str(lines))
    assert "#SBATCH --array=0-1\n" in text
    assert f"config-%a.yaml --run {tmp_path}/run/%a" in text


@pytest.mark.parametrize(
    ("words", "lines", "says"),
    [
        (["--set", "optim.lrr=1"], None, "optim.lr"),
        (["--set", "optim.batch_size=10"], None, "not divisible by memory.micro_batch 2 x 4 ranks"),
        (["--set", "data.lanes=2"], None, "does not divide the 2 lanes"),
        (["--gpus-per-node", "many"], None, "a100:8"),
        (["--verb", "train"], None, "known: distill, evaluate, finetune"),
        (["--verb", "finetune"], None, "`fdscale finetune` needs the number of classes"),
        (["--set", "classify.classes=3"], None, "run it with `fdscale finetune`"),
        (["--verb", "finetune", "--set", "classify.classes=3", "--set", "data.lanes=4"], None, "taken 2 at a time"),
        (["--verb", "evaluate", "--set", "classify.classes=3"], None, "data.heldout_shards is not set"),
        (["--ds", "absent.json"], None, "absent.json"),
        ([], "optim.lr=1e-3\noptim.lr=fast\n", "line 2"),
        ([], "optim.lr='1e-3\n", "line 1"),
        ([], "", "empty"),
        (["--sbatch", "--exclusive", "--dry-run"], None, "give --dry-run before it"),
    ],
)
def test_what_would_stop_the_job_is_said_at_once(
    submit: Callable[..., str], tmp_path: Path, words: list[str], lines: str | None, says: str
) -> None:
    if lines is not None:
        (tmp_path / "lines").write_text(lines)
        words = [*words, "--array", str(tmp_path / "lines")]
    assert says in submit("--dry-run", *words, code=2)


def test_without_slurm_it_says_so(submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no sbatch here" in submit(code=2)


def test_a_login_node_imports_no_torch() -> None:
    code = "import sys, fdscale.submit; assert not {'torch', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=outside(), check=True)


def test_the_scripts_pass_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here (Debian: apt-get install shellcheck)")
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_each_job_script_runs_its_own_verb() -> None:
    """A copied script that still runs the verb of another is a mistake that nobody sees."""
    for path in (ROOT / "slurm").glob("*.sbatch"):
        assert f'/slurm/job.sh" {path.stem} "$@"' in path.read_text()
        assert f"--job-name={path.stem}" in path.read_text()
