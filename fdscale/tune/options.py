"""What `fdscale tune` takes on the command line."""

from __future__ import annotations

import argparse

from fdscale.verbs import positive, recipe, verb, whole

TEXT = "find the fastest ds_config, micro-batch and memory policy for this machine, by measuring"
EXAMPLE = (
    "fdscale tune clip_vit_large_300 --out tuned --ranks 8 --set data.shards='/data/train-{0000..0639}.tar' \\\n"
    "    --set teacher.weights=/models/clip_vit_l14.safetensors\n"
    "  The same command again goes on where it stopped. Then train with what it found:\n"
    "  fdscale distill tuned/recipe.yaml --ds tuned/ds_config.json --run runs/clip-l"
)


def add(verbs: argparse._SubParsersAction) -> None:
    """The verb."""
    sub = verb(verbs, "tune", "fdscale.tune.app:main", TEXT, EXAMPLE)
    recipe(sub)
    sub.add_argument("--out", required=True, metavar="DIR", help="for results; an existing one is gone on with")
    ds = "a DeepSpeed JSON to try, the first is what you have now; may be repeated (default: those that ship)"
    sub.add_argument("--ds", action="append", default=[], metavar="FILE", help=ds)
    ranks = "processes of a trial: by torchrun, or by srun inside a Slurm allocation (default: the GPUs here, else 1)"
    sub.add_argument("--ranks", type=whole(1), metavar="N", help=ranks)
    gpu = "plan for this GPU what is worth measuring: a100-40g, ... as in `fdscale plan` (default: the one here)"
    sub.add_argument("--gpu", metavar="NAME", help=gpu)
    sub.add_argument("--trials", type=whole(1), default=16, metavar="N", help="measure at most so many (default: 16)")
    steps = "measured steps of a trial, in three parts; as many as one part come before them (default: 12)"
    sub.add_argument("--steps", type=int, default=12, metavar="N", help=steps)
    limit = "seconds after which a trial is given up (default: 900)"
    sub.add_argument("--limit", type=positive, default=900.0, metavar="S", help=limit)
    sub.add_argument("--json", action="store_true", help="print plain data instead of a table")
