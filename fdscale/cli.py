"""The command line: one verb per thing a person wants. No logic here, and nothing heavy is imported before a verb runs.

Exit codes: 0 done, 1 a bug (with traceback), 2 something to put right (one line), 3 the loss diverged, 74 a step hung,
75 stopped by a signal, after saving where there was anything new (start the same command again to go on), 76 another
start has taken the run over, 130 Ctrl-C (while training: the second).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from fdscale import UserError, __version__, signals
from fdscale.bench import options as bench
from fdscale.plan import options as plan
from fdscale.shards import options as shards
from fdscale.tune import options as tune
from fdscale.verbs import RAW, only_with, positive, recipe, settings, verb, whole

PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo, when another rank is gone


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="fdscale",
        formatter_class=RAW,
        description="Feature distillation at scale (arXiv 2205.14141).",
        epilog="try:  fdscale recipes        what can be run\n"
        "      fdscale doctor         what this machine can run\n"
        "      fdscale VERB --help    an example of each verb",
    )
    top.add_argument("--version", action="version", version=f"fdscale {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    _distill(verbs)
    _finetune(verbs)
    _evaluate(verbs)
    _probe(verbs)
    _diagnose(verbs)
    plan.add(verbs)
    tune.add(verbs)
    _submit(verbs)
    _cache(verbs)
    _export(verbs)
    _runs(verbs)
    _report(verbs)
    _recipes(verbs)
    _doctor(verbs)
    shards.add(verbs)
    bench.add(verbs)
    return top


def _distill(verbs: argparse._SubParsersAction) -> None:
    example = (
        "fdscale distill clip_vit_base_300 --run runs/clip-b --ds ds_configs/zero1.json \\\n"
        "    --set data.shards='/data/imagenet/train-{0000..0639}.tar' \\\n"
        "    --set teacher.weights=/models/clip_vit_b16.safetensors\n"
        "  The same command again goes on where the run stopped. On the 8 GPUs of a node:\n"
        "  torchrun --nproc-per-node 8 -m fdscale.cli -- distill clip_vit_base_300 ..."
    )
    sub = verb(verbs, "distill", "fdscale.distill:main", "train a student on the features of a frozen teacher", example)
    _training(sub)


def _finetune(verbs: argparse._SubParsersAction) -> None:
    example = (
        "fdscale finetune clip_vit_base_300_finetune --run runs/clip-b-ft --ds ds_configs/zero1.json \\\n"
        "    --set student.weights=runs/clip-b --set data.shards='/data/imagenet/train-{0000..0639}.tar' \\\n"
        "    --set data.heldout_shards=/data/imagenet/val\n"
        "  student.weights: a run of `fdscale distill`, or a file. The same command again goes on where it stopped."
    )
    text = "train a distilled student as a classifier of images or of their pixels, or to find objects"
    _training(verb(verbs, "finetune", "fdscale.finetune:main", text, example))


def _training(sub: argparse.ArgumentParser) -> None:
    recipe(sub)
    sub.add_argument("--run", required=True, metavar="DIR", help="run directory; an existing one is resumed")
    sub.add_argument("--steps", type=int, metavar="N", help="stop after step N; the schedule keeps its shape")
    ds = "DeepSpeed JSON: ZeRO stage, offload, precision (default: ZeRO 0 in float32)"
    sub.add_argument("--ds", metavar="FILE", help=ds)
    sub.add_argument("--resume", metavar="CHECKPOINT", help="start a new run from another run's checkpoint directory")


def _evaluate(verbs: argparse._SubParsersAction) -> None:
    example = (
        "fdscale evaluate runs/clip-b-ft --set data.heldout_shards=/data/imagenet/val\n"
        "  With torchrun or srun, ranks share the work; the result is the same. Weights of others, by a recipe:\n"
        "  fdscale evaluate clip_vit_base_300_finetune --weights clip_b_ft.pth --set data.heldout_shards=..."
    )
    text = "measure a classifier's, segmenter's or detector's accuracy on the held-out set, each image once"
    sub = verb(verbs, "evaluate", "fdscale.evaluate:main", text, example)
    _trained(sub, "take a whole classifier's weights from a file")
    sub.add_argument("--ema", action="store_true", help="the average of the weights (optim.ema), not the last ones")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the network")
    which = (
        "labels in place of those in the shards, one or several for an image: real.json of ImageNet ReaL, JSON or text"
    )
    sub.add_argument("--labels", metavar="FILE", help=which)
    server = "JSON file for what a detector has found, as COCO's server takes it"
    sub.add_argument("--results", metavar="FILE", help=server)
    to = "JSON file to write, with the accuracy of each class (default: RUN/evaluation/STEP.json)"
    sub.add_argument("--out", metavar="FILE", help=to)
    sub.add_argument("--json", action="store_true", help="print it, too")


def _trained(sub: argparse.ArgumentParser, weights: str) -> None:
    """What has been trained, and where: see `fdscale.student.find`."""
    where = "run directory or one checkpoint of it, with the run's own settings; or a recipe"
    sub.add_argument("source", metavar="RUN_OR_RECIPE", help=where)
    sub.add_argument("--run", metavar="DIR", help="of a recipe: take the newest checkpoint of this run")
    sub.add_argument("--weights", metavar="FILE", help=weights)
    settings(sub)


def _probe(verbs: argparse._SubParsersAction) -> None:
    example = (
        "fdscale probe runs/clip-b --set data.shards=/data/in1k/train --set data.heldout_shards=/data/in1k/val\n"
        "  The teacher of a recipe instead of a student:\n"
        "  fdscale probe clip_vit_base_300 --teacher --set teacher.weights=... --set data.shards=... "
        "--set data.heldout_shards=..."
    )
    text = "measure what frozen features know of classes: nearest neighbours, linear probe, few labels"
    sub = verb(verbs, "probe", "fdscale.probe:main", text, example)
    _trained(sub, "take a backbone's weights from a file")
    of = "probe the teacher of a recipe, of several the one of this name"
    sub.add_argument("--teacher", metavar="NAME", nargs="?", const="", help=of)
    sub.add_argument("--pool", choices=("mean", "cls"), default="mean", help="of the grid's tokens, or the class token")
    kinds = ("knn", "linear", "few-shot")
    sub.add_argument("--kinds", nargs="+", choices=kinds, metavar="KIND", help=f"of {', '.join(kinds)} (default: all)")
    sub.add_argument("--epochs", type=whole(1), default=90, metavar="N", help="of the linear probe (default: 90)")
    sub.add_argument("--out", metavar="FILE", help="JSON file to write")
    sub.add_argument("--json", action="store_true", help="print JSON")


def _diagnose(verbs: argparse._SubParsersAction) -> None:
    example = (
        "fdscale diagnose runs/clip-b --compare teacher --set data.heldout_shards=/data/imagenet/val\n"
        "  Of a recipe's teacher alone, or of several runs:\n"
        "  fdscale diagnose clip_vit_base_300 --teacher --set teacher.weights=... --set data.heldout_shards=...\n"
        "  fdscale diagnose runs/clip-b-ft --compare runs/other-ft --landscape line"
    )
    text = "measure what heads look at and what features are like, of a student beside its teacher"
    sub = verb(verbs, "diagnose", "fdscale.diagnosis:main", text, example)
    _trained(sub, "take a backbone's weights from a file")
    of = "the teacher of a recipe, of several the one of this name"
    sub.add_argument("--teacher", metavar="NAME", nargs="?", const="", help=of)
    others = (
        "runs or checkpoints to compare with, or `teacher`: all of the first one's recipe; teacher:NAME: one of them"
    )
    sub.add_argument("--compare", nargs="+", default=[], metavar="OTHER", help=others)
    count = "of data.heldout_shards, the first so many (default: 256)"
    sub.add_argument("--images", type=int, default=256, metavar="N", help=count)
    around = "also loss and accuracy of classifiers around their weights, along random directions or on planes"
    sub.add_argument("--landscape", choices=("line", "plane"), help=around)
    sub.add_argument("--points", type=int, metavar="N", help="of it, on each axis, odd (default: 11)")
    reach = "its ends, as multiples of the directions, which are as long as the weights (default: 1)"
    sub.add_argument("--reach", type=float, metavar="R", help=reach)
    sub.add_argument("--seeds", type=int, metavar="N", help="of its directions (default: 3)")
    sub.set_defaults(only_with=("landscape", {"points": 11, "reach": 1.0, "seeds": 3}))
    folder = "folder for diagnosis.json and pictures (default: diagnosis)"
    sub.add_argument("--out", default="diagnosis", metavar="DIR", help=folder)
    sub.add_argument("--json", action="store_true", help="print JSON")


def _submit(verbs: argparse._SubParsersAction) -> None:
    example = (
        "fdscale submit clip_vit_base_300 --run runs/clip-b --ds ds_configs/zero1.json \\\n"
        "    --nodes 8 --gpus-per-node 8 --time 24:00:00 --partition a100 \\\n"
        "    --set data.shards='/data/imagenet/train-{0000..0639}.tar' \\\n"
        "    --set teacher.weights=/models/clip_vit_b16.safetensors --sbatch --exclusive --mem=0"
    )
    sub = verb(verbs, "submit", "fdscale.submit:main", "run a recipe as a Slurm job that requeues itself", example)
    recipe(sub)
    sub.add_argument("--run", required=True, metavar="DIR", help="run directory; an existing one is resumed")
    sub.add_argument("--nodes", type=whole(1), default=1, metavar="N", help="nodes (default: 1)")
    gpus = "GPUs of each node, one rank per GPU; also TYPE:N; 0: a rank per node, on its CPUs (default: 8)"
    sub.add_argument("--gpus-per-node", default="8", metavar="N", help=gpus)
    cpus = "CPUs of each rank (default: data.workers and two more)"
    sub.add_argument("--cpus-per-task", type=whole(1), metavar="N", help=cpus)
    limit = "time limit of one start; at it the run is saved and requeued, until it is done"
    sub.add_argument("--time", required=True, metavar="TIME", help=limit)
    sub.add_argument("--partition", metavar="NAME", help="where to run")
    sub.add_argument("--account", metavar="NAME", help="who pays")
    sub.add_argument("--ds", metavar="FILE", help="DeepSpeed JSON (default: ZeRO 0 in float32)")
    sub.add_argument("--after", metavar="JOBID", help="start once that job is done; if it fails, never")
    array = "a job array: each line of the file holds overrides, such as optim.lr=1e-3; line K runs in DIR/K, K from 0"
    sub.add_argument("--array", metavar="FILE", help=array)
    what = "what to run: distill, finetune or evaluate (default: distill)"
    sub.add_argument("--verb", dest="script", default="distill", metavar="VERB", help=what)
    sub.add_argument("--dry-run", action="store_true", help="check, print the script, and submit nothing")
    rest = "everything after it goes to sbatch, for example --sbatch --exclusive --mem=0"
    sub.add_argument("--sbatch", nargs=argparse.REMAINDER, default=[], metavar="OPTION", help=rest)


def _cache(verbs: argparse._SubParsersAction) -> None:
    example = (
        "fdscale cache clip_vit_base_300 --out /scratch/clip-features --set cache.epochs=2 --set cache.dtype=int8 \\\n"
        "    --set data.shards='/data/imagenet100/train-{0000..0063}.tar' \\\n"
        "    --set teacher.weights=/models/clip_vit_b16.safetensors\n"
        "  The same command again goes on where it stopped; with torchrun or srun, ranks share the work. Then train:\n"
        "  fdscale distill, the same settings, and --set cache.features=/scratch/clip-features"
    )
    text = "write a teacher's features once, for runs that replay them"
    sub = verb(verbs, "cache", "fdscale.cache:main", text, example)
    sub.add_argument(
        "recipe", help="name of a shipped recipe (see `fdscale recipes`) or a YAML file; needs cache.epochs"
    )
    sub.add_argument(
        "--out", required=True, metavar="DIR", help="directory of the cache; an existing one is gone on with"
    )
    settings(sub)
    sub.add_argument("--repair", action="store_true", help="read every file there, and write the damaged ones anew")


def _export(verbs: argparse._SubParsersAction) -> None:
    example = "fdscale export runs/clip-b student.safetensors --names timm"
    sub = verb(verbs, "export", "fdscale.export:main", "write a student's weights as safetensors", example)
    sub.add_argument("source", help="run directory, or one checkpoint directory of it")
    sub.add_argument("out", help="file to write (.safetensors), or a directory for several files with an index")
    names = "parameter names: ours, microsoft's Swin V2 or BEiT's, or timm's (default: fdscale)"
    sub.add_argument("--names", choices=("fdscale", "official", "timm"), default="fdscale", help=names)
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision")
    size = "most of a file in a directory, in GiB (default: 5)"
    sub.add_argument("--shard-gib", type=positive, default=5.0, metavar="N", help=size)
    sub.add_argument("--ema", action="store_true", help="the average of the weights (optim.ema), not the last ones")
    sub.add_argument("--force", action="store_true", help="replace existing weights")


def _runs(verbs: argparse._SubParsersAction) -> None:
    text = "list runs: their state, progress, restarts and goodput"
    sub = verb(verbs, "runs", "fdscale.runs:main", text, "fdscale runs /scratch/runs --json")
    where = "run directories, or directories that hold some (default: runs)"
    sub.add_argument("directories", nargs="*", default=["runs"], metavar="DIR", help=where)
    slow = "how fast each rank is, the slowest first: the 50th, 95th and 100th percentile of the last steps"
    sub.add_argument("--ranks", action="store_true", help=slow)
    sub.add_argument("--json", action="store_true", help="machine-readable output")


def _report(verbs: argparse._SubParsersAction) -> None:
    example = (
        "fdscale report runs/clip-b\n"
        "  Beside another run, with a diagnosis, its pictures and its table:\n"
        "  fdscale report runs/clip-b --compare runs/clip-b-100 --pictures diagnosis --out clip-b.html"
    )
    text = "write one HTML file about a run, living or ended: curves, time, starts, pictures, settings"
    sub = verb(verbs, "report", "fdscale.report:main", text, example)
    sub.add_argument("run", metavar="RUN", help="run directory")
    sub.add_argument(
        "--compare", metavar="OTHER", help="another run, whose curves stand beside, with what was set otherwise"
    )
    folders = "folder of pictures, or of a diagnosis, to take in besides the run's own; repeatable"
    sub.add_argument("--pictures", action="append", default=[], metavar="DIR", help=folders)
    data = "folder for what the page shows, as files: curves.csv, report.json, and a .svg of each chart"
    sub.add_argument("--data", metavar="DIR", help=data)
    sub.add_argument("--out", metavar="FILE", help="file to write (default: RUN/report.html)")


def _recipes(verbs: argparse._SubParsersAction) -> None:
    example = "fdscale recipes clip_vit_base_300"
    sub = verb(verbs, "recipes", "fdscale.catalog:main", "list the recipes, or show one", example)
    sub.add_argument("recipe", nargs="?", help="show this one instead of the list")
    sub.add_argument("--keys", action="store_true", help="list every key with its default and meaning")
    sub.add_argument("--json", action="store_true", help="machine-readable output")


def _doctor(verbs: argparse._SubParsersAction) -> None:
    text = "say what this machine can run and what is missing"
    sub = verb(verbs, "doctor", "fdscale.doctor:main", text, "fdscale doctor --path /data --path /checkpoints")
    sub.add_argument("--json", action="store_true", help="machine-readable output")
    build = "also compile now what DeepSpeed would at first use, under this ds_config (default: ZeRO 0)"
    where = "also look at where data or runs lie: room, speed (64 MiB are written, read and removed), clock; repeatable"
    sub.add_argument("--path", action="append", default=[], metavar="DIR", help=where)
    sub.add_argument("--build", nargs="?", const="", metavar="FILE", help=build)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # torchrun's own parser stumbles over --run (it has --run-path) on Python 3.11, unless `--` stands before the verb.
    arguments = vars(parser().parse_args(words[1:] if words[:1] == ["--"] else words))
    if arguments["verb"] in ("distill", "finetune") and argv is None:
        signals.leave_at_once()
    elif arguments["verb"] == "evaluate" and argv is None:
        signals.leave_at_once("in an evaluation")
    for key in ("verb", "what"):
        arguments.pop(key, None)
    module, _, function = arguments.pop("target").partition(":")
    try:
        only_with(arguments)
        return getattr(importlib.import_module(module), function)(**arguments) or 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"fdscale: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        if not any(sign in str(error) for sign in PEER_GONE):
            raise
        print(f"fdscale: rank {os.environ.get('RANK', '0')}: another rank ended; its message says why", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fdscale: interrupted", file=sys.stderr)
        return signals.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
