"""What `fdscale shards` takes on the command line."""

from __future__ import annotations

import argparse
import os

from fdscale.verbs import positive, verb, whole

CORES = min(8, os.cpu_count() or 1)


def add(verbs: argparse._SubParsersAction) -> None:
    """The verbs."""
    shards = verbs.add_parser("shards", help="make, index, verify, describe and reshard WebDataset shards")
    kinds = shards.add_subparsers(dest="what", metavar="WHAT", required=True)
    _shards_make(kinds)
    _shards_index(kinds)
    _shards_verify(kinds)
    _shards_stats(kinds)
    _shards_reshard(kinds)


def _common(sub: argparse.ArgumentParser, default: str = "index/ beside the shards") -> None:
    sub.add_argument("--index", metavar="DIR", help=f"directory of the index (default: {default})")
    sub.add_argument("--workers", type=whole(0), default=CORES, metavar="N", help=f"processes (default: {CORES})")
    sub.add_argument("--json", action="store_true", help="machine-readable output")


def _given_shards(sub: argparse.ArgumentParser, several: bool = True) -> None:
    where = "directory, glob or brace pattern, also of URLs"
    if several:
        sub.add_argument("shards", nargs="+", help=f"{where}, or several of them")
    else:
        sub.add_argument("shards", help=where)
    cache = "directory that keeps shards from elsewhere (default: one in the system's temporary directory)"
    sub.add_argument("--shard-cache", metavar="DIR", help=cache)
    sub.add_argument(
        "--shard-cache-gib", type=positive, default=64.0, metavar="GIB", help="most it holds (default: 64)"
    )


def _shard_sizes(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--samples-per-shard", type=whole(1), metavar="N", help="where a shard ends (default: 10000)")
    sub.add_argument("--shard-mib", type=positive, metavar="MIB", help="where a shard ends, by its size instead")


def _shards_make(kinds: argparse._SubParsersAction) -> None:
    text = "pack images into shards: a folder, a table, Parquet, or a Hugging Face data set"
    example = (
        "fdscale shards make ~/photos shards/train --resize 512\n"
        "  fdscale shards make list.csv shards/train --samples-per-shard 5000\n"
        "  fdscale shards make ~/imagenet-1k shards/val --split validation --skip-damaged"
    )
    sub = verb(kinds, "make", "fdscale.shards.app:make", text, example)
    source = (
        "folder of images (class subfolders give labels), .csv, .tsv, .jsonl or .parquet, Hugging Face folder, or "
        "folder with images/ and their masks in annotations/ (ADEChallengeData2016), or COCO's or Objects365's"
    )
    sub.add_argument("source", help=source)
    sub.add_argument("out", help="directory of the shards; must not exist")
    _shard_sizes(sub)
    sub.add_argument("--seed", type=int, default=0, help="of the order in which samples are packed (default: 0)")
    sub.add_argument("--keep-order", action="store_true", help="pack in the order of the source instead")
    sub.add_argument("--split", metavar="NAME", help="of a source that has several, such as train")
    sub.add_argument("--image", metavar="COLUMN", help="of a table: paths, or in Parquet the images themselves")
    label = (
        'of a table: names or numbers of classes (default: "label" or "cls"); none: leave labels out, a folder\'s, too'
    )
    sub.add_argument("--label", metavar="COLUMN", help=label)
    sub.add_argument("--key", metavar="COLUMN", help='of a table: keys of the samples (default: "key", or the paths)')
    resize = "shrink images to at most so many pixels on the short side; the others keep their bytes"
    sub.add_argument("--resize", type=int, metavar="PIXELS", help=resize)
    quality = "JPEG quality of what is written anew (default: 90); without --resize, of every image that gets smaller"
    sub.add_argument("--quality", type=int, metavar="Q", help=quality)
    sub.add_argument("--no-check", action="store_true", help="do not decode images to see whether they are whole")
    sub.add_argument("--skip-damaged", action="store_true", help="leave broken images out and list them, not stop")
    _common(sub, "OUT/index")


def _shards_index(kinds: argparse._SubParsersAction) -> None:
    example = "fdscale shards index '/data/train-{0000..0639}.tar' --index /scratch/train-index"
    sub = verb(kinds, "index", "fdscale.shards.app:index", "index existing shards; they are not touched", example)
    _given_shards(sub)
    sub.add_argument("--skip-damaged", action="store_true", help="index what is whole and list the rest, not stop")
    idx = "take offsets from DALI's .idx files (v1.2) beside the shards, instead of reading every header"
    sub.add_argument("--trust-idx", action="store_true", help=idx)
    _counts(sub)
    _common(sub)


def _counts(sub: argparse.ArgumentParser) -> None:
    text = "a JSON file of wids, Energon or open_clip that says how many samples each shard holds; those beside the "
    sub.add_argument("--counts", action="append", default=[], metavar="FILE", help=text + "shards are found without")


def _shards_verify(kinds: argparse._SubParsersAction) -> None:
    text = "read shards against their index and name every problem; exit code 2 if there is one"
    sub = verb(kinds, "verify", "fdscale.shards.app:verify", text, "fdscale shards verify shards/train --decode")
    _given_shards(sub)
    sub.add_argument("--decode", action="store_true", help="also decode every image")
    sub.add_argument("--unique-keys", action="store_true", help="also look for keys that several shards hold")
    _counts(sub)
    _common(sub)


def _shards_stats(kinds: argparse._SubParsersAction) -> None:
    text = "count what is in shards: samples, bytes, members, image sizes, classes"
    sub = verb(kinds, "stats", "fdscale.shards.app:stats", text, "fdscale shards stats shards/train")
    _given_shards(sub)
    sub.add_argument("--sample", type=whole(0), default=1000, metavar="N", help="images looked into (default: 1000)")
    _common(sub)


def _shards_reshard(kinds: argparse._SubParsersAction) -> None:
    text = "write the samples of indexed shards into shards of another size"
    example = "fdscale shards reshard '/data/train-{0000..0639}.tar' /data/train-256 --shard-mib 256 --shuffle"
    sub = verb(kinds, "reshard", "fdscale.shards.app:reshard", text, example)
    _given_shards(sub, several=False)
    sub.add_argument("out", help="directory of the new shards; must not exist")
    _shard_sizes(sub)
    sub.add_argument("--shuffle", action="store_true", help="mix the samples of all shards")
    sub.add_argument("--seed", type=int, default=0, help="of --shuffle (default: 0)")
    sub.add_argument("--prefix-keys", action="store_true", help="put the name of the old shard before each key")
    sub.add_argument("--out-index", metavar="DIR", help="directory of the new index (default: OUT/index)")
    _common(sub)
