"""`fdscale submit`: a run as a Slurm job that saves, requeues itself and goes on until it is done.

RUN/slurm/submit-001/ gets what the job needs: the resolved config, the ds_config, the code with its commit and
uncommitted changes, and the job script, which is slurm/VERB.sbatch filled in. The job reads nothing else of what may
change while it waits in the queue or is requeued. Nothing here imports torch, so that it is quick on a login node.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fdscale import UserError, config
from fdscale.data.index import open_index
from fdscale.data.order import check_world, default_lanes
from fdscale.data.sources import is_remote
from fdscale.engine import ds_config

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent


def main(
    recipe: str,
    run: str,
    nodes: int,
    gpus_per_node: str,
    cpus_per_task: int | None,
    time: str,
    partition: str | None,
    account: str | None,
    set: list[str],
    ds: str | None,
    after: str | None,
    array: str | None,
    script: str,
    dry_run: bool,
    sbatch: list[str],
) -> int:
    """`fdscale submit`."""
    if "--dry-run" in sbatch:
        raise UserError("--sbatch takes everything after it: give --dry-run before it")
    scripts = scripts_folder()
    template = scripts / f"{script}.sbatch"
    if not template.is_file():
        known = ", ".join(sorted(path.stem for path in scripts.glob("*.sbatch")))
        raise UserError(f"--verb {script}: there is no {template}; known: {known}")
    if nodes < 1 or not re.fullmatch(r"(\w+:)?\d+", gpus_per_node):
        raise UserError(
            f"--nodes {nodes} --gpus-per-node {gpus_per_node}: expected at least one node, and GPUs such as "
            "8, a100:8, or 0"
        )
    gpus = int(gpus_per_node.rpartition(":")[2])
    ranks = nodes * max(gpus, 1)
    configs = read_configs(script, recipe, set, array, ranks)
    if ds is not None and script == "evaluate":
        raise UserError("--ds is for training; evaluate has no use for a ds_config")
    ds_config.read(ds)
    if not dry_run and not shutil.which("sbatch"):
        raise UserError("there is no sbatch here: submit from a login node of the cluster, or look with --dry-run")

    directory = Path(run).absolute()
    folder = next_folder(directory / "slurm")
    # %a is the number of the array's task: Slurm puts it into names of logs, job.sh elsewhere.
    words = [str(folder / ("config-%a.yaml" if array else "config.yaml"))]
    words += ["--run", str(directory / "%a" if array else directory)]
    words += ["--ds", str(folder / "ds_config.json")] if ds else []
    log = directory / "slurm" / ("job-%A_%a.log" if array else "job-%j.log")
    options = {
        "nodes": nodes,
        "ntasks-per-node": max(gpus, 1),
        "gpus-per-node": gpus_per_node if gpus else None,
        "cpus-per-task": cpus_per_task or max(settings.data.workers for settings in configs) + 2,
        "time": time,
        "partition": partition,
        "account": account,
        "array": f"0-{len(configs) - 1}" if array else None,
        "dependency": f"afterok:{after}" if after else None,
        "kill-on-invalid-dep": "yes" if after else None,
        "output": log,
    }
    text = fill(template.read_text(), options, sbatch, folder, words)
    if dry_run:
        print(text, end="")
        return 0
    names = [words[0].replace("%a", str(number)) for number in range(len(configs))]
    snapshot(folder, scripts, ds, dict(zip(names, configs, strict=True)))
    job = folder / template.name
    job.write_text(text)
    number = queue(job)
    print(f"submitted job {number}: {job}\nlog: {re.sub('%[jA]', number, str(log))}")
    return 0


def scripts_folder() -> Path:
    """Where the job scripts lie: beside the package in a source tree, inside it where it was installed."""
    inside = PACKAGE / "slurm"
    return inside if inside.is_dir() else ROOT / "slurm"


def read_configs(verb: str, recipe: str, overrides: list[str], array: str | None, ranks: int) -> list[config.Config]:
    """The config of the job, or of each of an array's tasks, checked as far as that is quick.

    Raises UserError that names the line of the array's file.
    """
    if array is None:
        settings = config.load(recipe, overrides)
        check(verb, settings, ranks)
        return [settings]
    try:
        lines = [line for line in Path(array).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--array {array}: {error}") from None
    if not lines:
        raise UserError(f"--array {array} is empty; expected lines of overrides, such as optim.lr=1e-3 data.seed=1")
    configs = []
    for number, line in enumerate(lines):
        try:
            configs.append(config.load(recipe, [*overrides, *shlex.split(line)]))
            check(verb, configs[-1], ranks)
        except ValueError as error:  # also of shlex
            raise UserError(f"{array}, line {number + 1}: {error}") from None
    return configs


def check(verb: str, settings: config.Config, ranks: int) -> None:
    """What would stop the job as soon as it starts, as far as this machine can tell. Raises UserError."""
    data, batch = settings.data, settings.optim.batch_size
    config.check_verb(settings, verb)
    if verb == "evaluate":
        if not data.heldout_shards:
            raise UserError("data.heldout_shards is not set: --set data.heldout_shards=DIRECTORY_OR_PATTERN")
        return
    if not data.shards:
        raise UserError("data.shards is not set: --set data.shards=DIRECTORY_OR_PATTERN")
    ds_config.accumulation(batch, settings.memory.micro_batch, ranks)
    lanes = data.lanes
    if lanes is None and data.weights is None and not any(is_remote(shard) for shard in data.shards):
        try:
            index = open_index(data.shards, data.index[0] if data.index else None)
        except (UserError, OSError) as error:  # a login node need not see the data
            print(f"not checked here: {error}", file=sys.stderr)
        else:
            lanes = default_lanes(batch, len(index.names), index.samples)
    if lanes is not None:
        check_world(lanes, ranks, config.together(settings))


def next_folder(parent: Path) -> Path:
    """The first name that is free, submit-001 and so on; made by `snapshot`."""
    taken = [int(path.name[7:]) for path in parent.glob("submit-*") if path.name[7:].isdigit()]
    return parent / f"submit-{max(taken, default=0) + 1:03d}"


def fill(text: str, options: Mapping[str, object], more: list[str], folder: Path, words: list[str]) -> str:
    """A job script with sbatch's options, the place of its code, and its arguments.

    options: those that are None are left as the script has them. more: options as a person wrote them, which win.
    """
    given = {name: str(value) for name, value in options.items() if value is not None}
    lines = [line for line in text.splitlines() if not re.match(rf"#SBATCH --({'|'.join(given)})\b", line)]
    end = next(
        number for number, line in enumerate(lines) if line and not line.startswith("#")
    )  # sbatch reads no further
    head = [line for line in lines[:end] if line]
    head += [f"#SBATCH {_quoted(f'--{name}={value}')}" for name, value in given.items()]
    head += ["#SBATCH " + " ".join(map(_quoted, more))] if more else []
    body = [
        f"FDSCALE_SOURCE={shlex.quote(str(folder))} FDSCALE_PYTHON={shlex.quote(sys.executable)}",
        f"set -- {shlex.join(words)}",
    ]
    return "\n".join([*head, "", *body, *lines[end:], ""])


def _quoted(option: str) -> str:
    """For a line that sbatch reads, which knows double quotes alone."""
    return f'"{option}"' if re.search(r"\s", option) else option


def snapshot(folder: Path, scripts: Path, ds: str | None, configs: dict[str, config.Config]) -> None:
    """Everything that the job reads, as it is now: later edits change neither a queued nor a requeued job."""
    try:
        folder.mkdir(parents=True)
        without = shutil.ignore_patterns("__pycache__", "slurm", "ds_configs")
        shutil.copytree(PACKAGE, folder / "fdscale", ignore=without)
        shutil.copytree(scripts, folder / "slurm")
        for path, settings in configs.items():
            Path(path).write_text(config.dump(settings))
        if ds:
            shutil.copyfile(ds_config.find(ds), folder / "ds_config.json")
        if (ROOT / ".git").exists():
            (folder / "COMMIT").write_text(_git("describe", "--always", "--dirty"))
            (folder / "changes.diff").write_text(_git("diff", "HEAD"))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from None


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout


def queue(script: Path) -> str:
    """Hand a job script to Slurm; the job's id. Raises UserError with Slurm's reason where it is refused."""
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(script.parent)
        raise UserError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    print(done.stderr, end="", file=sys.stderr)  # advice
    return done.stdout.strip().partition(";")[0]  # after a semicolon, the cluster
