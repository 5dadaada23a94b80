"""What `fdscale bench` takes on the command line."""

from __future__ import annotations

import argparse

from fdscale.verbs import new_file, positive, recipe, verb, whole


def add(verbs: argparse._SubParsersAction) -> None:
    """All tables."""
    bench = verbs.add_parser("bench", help="measure against what else there is, side by side")
    tables = bench.add_subparsers(dest="what", metavar="WHAT", required=True)
    _data(tables)
    _workers(tables)
    _attention(tables)
    _model(tables)
    _fused(tables)
    _shuffle(tables)
    _step(tables)
    _loop(tables)
    _teacher(tables)
    _checkpoint(tables)
    _policies(tables)


def _data(tables: argparse._SubParsersAction) -> None:
    text = "measure decoding, the whole loader and indexing"
    sub = verb(tables, "data", "fdscale.bench.data:main", text, "fdscale bench data --json data.json")
    _rounds(sub)
    _quick(sub)
    _json(sub)


def _workers(tables: argparse._SubParsersAction) -> None:
    text = "measure worker processes against threads, in a training step"
    sub = verb(tables, "workers", "fdscale.bench.workers:main", text, "fdscale bench workers --json workers.json")
    _rounds(sub)
    _quick(sub)
    _json(sub)


def _attention(tables: argparse._SubParsersAction) -> None:
    text = "measure window attention against the official code and torch's own"
    sub = verb(tables, "attention", "fdscale.bench.attention:main", text, "fdscale bench attention --rounds 20")
    sub.add_argument(
        "--rounds", type=whole(1), metavar="N", help="on a CPU, rounds in which all take turns (default: 12)"
    )
    _threads(sub)
    sub.add_argument("--quick", action="store_true", help="on a CPU whether it runs; on a GPU two layers")
    _json(sub)
    limit = "on a GPU, begin no layer after so many seconds (default: none)"
    sub.add_argument(
        "--seconds", type=positive, default=20.0, metavar="S", help="on a GPU, of each layer (default: 20)"
    )
    sub.add_argument("--limit", type=positive, metavar="S", help=limit)
    compiled = "on a GPU, time the ways of torch.compile on the first N layers only (default: on all)"
    sub.add_argument("--compiled", type=whole(0), metavar="N", help=compiled)
    sub.add_argument("--resume", action="store_true", help="on a GPU, keep the layers that are in the JSON file")


def _model(tables: argparse._SubParsersAction) -> None:
    text = "measure whole networks by every path of window attention"
    sub = verb(tables, "model", "fdscale.bench.model:main", text, "fdscale bench model --json model.json")
    sub.add_argument("--seconds", type=positive, default=10.0, metavar="S", help="of each network (default: 10)")
    sub.add_argument(
        "--limit", type=positive, metavar="S", help="begin no network after so many seconds (default: none)"
    )
    _json(sub)


def _fused(tables: argparse._SubParsersAction) -> None:
    text = "measure the small fused ops against torch.compile of the same"
    sub = verb(tables, "fused", "fdscale.bench.fused:main", text, "fdscale bench fused --json fused.json")
    _quick(sub)
    _json(sub)


def _shuffle(tables: argparse._SubParsersAction) -> None:
    text = "measure how well batches are mixed"
    sub = verb(tables, "shuffle", "fdscale.bench.shuffle:main", text, "fdscale bench shuffle --json shuffle.json")
    _json(sub)


def _step(tables: argparse._SubParsersAction) -> None:
    text = "measure the training step of a recipe, its parts, and the same by official code or timm"
    example = "fdscale bench step swinv2_g --ds ds_configs/swinv2_g_141g.json --json step.json"
    sub = verb(tables, "step", "fdscale.bench.step:main", text, example)
    recipe(sub)
    sub.add_argument("--ds", metavar="FILE", help="DeepSpeed JSON (default: ZeRO 0 in float32)")
    other = "what to compare with (default: official for window attention, else timm)"
    sub.add_argument("--against", default="auto", choices=("auto", "official", "timm", "eager", "none"), help=other)
    sub.add_argument("--accumulate", type=whole(1), default=1, metavar="N", help="micro-batches in a step (default: 1)")
    _rounds(sub)
    _threads(sub)
    _json(sub)


def _loop(tables: argparse._SubParsersAction) -> None:
    text = "measure what the training loop adds to a plain one, and the network against timm's"
    sub = verb(tables, "loop", "fdscale.bench.loop:main", text, "fdscale bench loop --json loop.json")
    _rounds(sub)
    sub.add_argument("--batch", type=whole(1), default=8, metavar="N", help="images in a batch (default: 8)")
    _threads(sub)
    _json(sub)


def _teacher(tables: argparse._SubParsersAction) -> None:
    text = "measure what a teacher's precision does to the target, to memory and to time"
    example = "fdscale bench teacher clip_vit_large_300 --set teacher.weights=FILE --set data.shards=SHARDS"
    sub = verb(tables, "teacher", "fdscale.bench.teacher:main", text, example)
    recipe(sub)
    sub.add_argument("--images", type=whole(1), default=256, metavar="N", help="views that are compared (default: 256)")
    _rounds(sub)
    _threads(sub)
    _json(sub)


def _checkpoint(tables: argparse._SubParsersAction) -> None:
    text = "measure for how long training waits for a checkpoint"
    sub = verb(tables, "checkpoint", "fdscale.bench.checkpoint:main", text, "fdscale bench checkpoint --width 768")
    _rounds(sub)
    sub.add_argument(
        "--width", type=whole(1), default=768, metavar="N", help="channels of the ViT (default: 768, 86 M)"
    )
    sub.add_argument("--batch", type=whole(1), default=1, metavar="N", help="images in a batch of a rank (default: 1)")
    sub.add_argument("--stage", type=int, default=1, choices=(0, 1, 2, 3), help="ZeRO stage (default: 1)")
    sub.add_argument("--folder", metavar="DIR", help="where to write (default: the system's temporary directory)")
    _quick(sub)
    _json(sub)


def _policies(tables: argparse._SubParsersAction) -> None:
    text = "measure what each memory policy saves, and what it costs"
    sub = verb(tables, "policies", "fdscale.bench.policies:main", text, "fdscale bench policies --json policies.json")
    _rounds(sub)
    _threads(sub)
    _quick(sub)
    _json(sub)


def _rounds(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--rounds", type=whole(1), default=12, metavar="N", help="in which all take turns (default: 12)")


def _threads(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads (default: all cores)")


def _quick(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--quick", action="store_true", help="a round of next to nothing: whether it runs")


def _json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", type=new_file, metavar="FILE", help="also write every measured time as JSON")
