"""`fdscale diagnose`: what the heads of a network look at, and what its features are like, beside those of others.

The tools of arXiv 2205.14141, section 4, in their public definitions; choices that these leave open are told in
`diagnose.attention`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from fdscale import UserError, assemble, config, dist, landscapes, student
from fdscale.data.augment import eval_view
from fdscale.diagnose import heads
from fdscale.diagnose.attention import Attended, block_outputs, has_attention, watched
from fdscale.diagnose.features import LayerLikeness, Likeness, Moments
from fdscale.diagnose.heads import Heads, Look
from fdscale.durable import as_json, must_be_writable, write_atomically
from fdscale.engine.initialize import prepare_environment
from fdscale.inputs import heldout_batches, normalise, open_heldout, to_device
from fdscale.landscapes import Wanted
from fdscale.objective import whiten

FILES = ("features.jpg", "heads.png", "offsets.png", "average.png", "blocks.png", "landscape.png", "maps.npz")
SHOWN = 5  # images whose maps are drawn


class Subject(NamedTuple):
    """A network that is looked at. tokens: of RGB (B, 3, H, W) in [0, 1], (B, L, C) with `prefix` in front of the
    grid's, (h, w) tokens. size: (height, width) of the images as the network itself gets them. trained: settings and
    weights, None of a teacher."""

    name: str
    network: nn.Module
    tokens: Callable[[Tensor], Tensor]
    prefix: int
    grid: tuple[int, int]
    size: tuple[int, int]
    trained: tuple[config.Config, Path | str] | None = None


class Found(NamedTuple):
    """What was seen of a subject: its heads by block, none of a network without attention; its tokens as they come and
    whitened; and the whitened maps (n, h, w, C) of the images that are shown."""

    looks: list[Look]
    raw: Any
    whitened: Any
    maps: Tensor


class Together(NamedTuple):
    """What was seen of all subjects: `tokens` (subjects, subjects), linear CKA of their mean tokens; `blocks`, the same
    of the outputs of all blocks of all subjects, one subject after the other; images (n, 3, H, W) uint8 to show."""

    tokens: Tensor
    blocks: Tensor | None
    images: Tensor


def main(
    source: str, run: str | None, weights: str | None, set: list[str], teacher: str | None, compare: list[str],
    images: int, out: str, json: bool, landscape: str | None, points: int, reach: float, seeds: int,
) -> int:  # fmt: skip
    """Look, print, and write diagnosis.json and pictures into a folder."""
    prepare_environment()
    dist.init()
    if images < 1:
        raise UserError(f"--images must be at least 1, got {images}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib, which is not installed: pip install matplotlib")
    must_be_writable(Path(out) / "diagnosis.json")
    settings, subjects = _subjects(source, run, weights, set, teacher, compare)
    around = {}
    if landscape is not None:
        around = _landscapes(subjects, images, Wanted(landscape, points, reach, seeds))
    found, together = look(settings, subjects, images)
    if dist.rank() == 0:
        report = as_data(subjects, found, together) | ({"landscapes": around} if around else {})
        folder = Path(out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:  # of an earlier diagnosis, which may have had more
                (folder / name).unlink(missing_ok=True)
            write_atomically(folder / "diagnosis.json", as_json(report, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{out}: could not be written ({error}); name another with --out") from None
        pictures(subjects, found, together, folder)
        if around:
            from fdscale.diagnose import plots

            plots.landscape(around, folder / "landscape.png")
        print(as_json(report) if json else f"{for_a_person(report)}\npictures and numbers: {folder}")
    dist.close()
    return 0


def _subjects(
    source: str, run: str | None, weights: str | None, overrides: Sequence[str], teacher: str | None, compare: list[str]
) -> tuple[config.Config, list[Subject]]:
    """The networks, the first one's settings saying which images they see."""
    if teacher is not None:
        if run is not None or weights is not None:
            raise UserError("--teacher is the recipe's own: leave out --run and --weights, which are a student's")
        settings = config.load(source, overrides)
        first = _teacher(settings, teacher)
    else:
        settings, checkpoint = student.find(source, run, weights, overrides)
        first = _student(settings, checkpoint if checkpoint is not None else str(weights), "student")
    others = []
    for one in compare:
        kind, _, called = one.partition(":")
        if kind == "teacher":
            names = [called] if called else config.teachers_of(settings)
            others += [_teacher(settings, name) for name in names]
        else:
            theirs, checkpoint = student.find(one, None, None, ())
            assert checkpoint is not None
            theirs = dataclasses.replace(theirs, data=settings.data)
            others.append(_student(theirs, checkpoint, Path(one).name))
    subjects = [first, *others]
    return settings, [one._replace(name=name) for one, name in zip(subjects, distinct(subjects), strict=True)]


def distinct(subjects: Sequence[Subject]) -> list[str]:
    """Their names, with a number behind those that stand before already."""
    found: list[str] = []
    for subject in subjects:
        same = sum(name.split(" (")[0] == subject.name for name in found)
        found.append(f"{subject.name} ({same + 1})" if same else subject.name)
    return found


def _student(settings: config.Config, weights: Path | str, name: str) -> Subject:
    network = student.loaded_backbone(settings, weights)
    size = (settings.data.image_size,) * 2
    tokens = lambda images: network(normalise(images, torch.float32))  # noqa: E731
    return Subject(name, network, tokens, len(network.prefix), network.grid(size), size, (settings, weights))


def _landscapes(subjects: list[Subject], images: int, wanted: Wanted) -> dict[str, dict[str, Any]]:
    """Around each of them; what cannot be is told before anything is measured."""
    wanted.check()
    for subject in subjects:
        if subject.trained is None or config.task_of(subject.trained[0]) != "finetune":
            raise UserError(f"{subject.name} is no classifier of images: --landscape is of fine-tuned ones")
    return {one.name: landscapes.around(*one.trained, images, wanted) for one in subjects if one.trained is not None}


def _teacher(settings: config.Config, name: str) -> Subject:
    teacher = assemble.teacher_alone(settings, name)
    size = teacher.image_size or (settings.data.image_size,) * 2
    grid = teacher.grid((settings.data.image_size,) * 2)
    return Subject(f"teacher {name}".rstrip(), teacher.network, teacher, len(teacher.prefix), grid, size)


@torch.no_grad()
def look(settings: config.Config, subjects: list[Subject], images: int) -> tuple[list[Found], Together]:
    """At so many images of data.heldout_shards; a collective."""
    index = open_heldout(settings.data)
    if index is None:
        raise UserError("data.heldout_shards is not set: --set data.heldout_shards=DIRECTORY_OR_PATTERN")
    images = min(images, index.samples)
    data = dataclasses.replace(settings.data, heldout_samples=images)
    view = functools.partial(eval_view, size=data.image_size, interpolation=data.interpolation, decoding=data.decode)
    gathered: list[dict[int, Heads]] = [{} for _ in subjects]
    moments = [(Moments(), Moments()) for _ in subjects]
    likeness, layers = Likeness(len(subjects), len(subjects)), LayerLikeness()
    shown: list[list[Tensor]] = [[] for _ in range(1 + len(subjects))]  # images, and the maps of each subject
    with Progress(console=Console(stderr=True), transient=True, disable=dist.rank() != 0) as progress:
        bar = progress.add_task("images", total=images)
        for batch in heldout_batches(dataclasses.replace(settings, data=data), index, view):
            counted, seen = batch["weights"].bool(), to_device(batch["images"])
            means: list[Tensor] = []
            outputs: list[Tensor] = []
            room = SHOWN - sum(map(len, shown[0]))
            shown[0].append(batch["images"][counted][:room])
            for subject, blocks, (raw, whitened), maps in zip(subjects, gathered, moments, shown[1:], strict=True):
                see = functools.partial(_see, blocks, counted)
                tokens = _tokens(subject, seen, see, outputs)[counted.to(seen.device)][:, subject.prefix :]
                if not tokens.isfinite().all():
                    raise UserError(f"features of {subject.name} are not finite")
                raw.add(tokens)
                whitened.add(whiten(tokens))
                means.append(tokens.mean(1))
                maps.append(whiten(tokens[:room]).unflatten(1, subject.grid).cpu())
            likeness.add(means, means)
            layers.add(batch["numbers"][counted].tolist(), [one[counted.to(one.device)] for one in outputs])
            progress.update(bar, advance=len(batch["numbers"]) * dist.world())
    found = []
    for blocks, (raw, whitened), maps in zip(gathered, moments, shown[1:], strict=True):
        looks = [blocks[number].result() for number in sorted(blocks)]
        found.append(Found(looks, raw.result(), whitened.result(), torch.cat(maps)))
    some = any(one.looks for one in found)
    return found, Together(likeness.result(), layers.result() if some else None, torch.cat(shown[0]))


def _tokens(subject: Subject, images: Tensor, see: Callable[[int, Attended], None], outputs: list[Tensor]) -> Tensor:
    """A subject's tokens; mean tokens of its blocks go to `outputs`."""
    if not has_attention(subject.network):
        return subject.tokens(images)

    def give(number: int, output: Tensor) -> None:
        places = output[:, subject.prefix :] if output.ndim == 3 else output.flatten(1, 2)
        outputs.append(places.mean(1))

    with watched(subject.network, subject.size, see), block_outputs(subject.network, give):
        return subject.tokens(images)


def _see(blocks: dict[int, Heads], counted: Tensor, number: int, attended: Attended) -> None:
    blocks.setdefault(number, Heads()).add(attended, counted)


def as_data(subjects: list[Subject], found: list[Found], together: Together) -> dict[str, Any]:
    """Plain numbers."""
    return {
        "subjects": [
            {
                "name": subject.name,
                "network": type(subject.network).__name__,
                "image_size": list(subject.size),
                "images": one.looks[0].images if one.looks else None,
                "blocks": [heads.as_data(look) for look in one.looks],
                "features": {
                    name: {
                        "effective_rank": value.effective_rank,
                        "channels": len(value.mean),
                        "mean": value.mean.tolist(),
                        "std": value.std.tolist(),
                    }
                    for name, value in (("raw", one.raw), ("whitened", one.whitened))
                },
            }
            for subject, one in zip(subjects, found, strict=True)
        ],
        "cka_of_mean_tokens": together.tokens.tolist(),
        "cka_of_blocks": None if together.blocks is None else together.blocks.tolist(),
    }


def for_a_person(report: dict[str, Any]) -> str:
    """A line for each subject and block."""
    lines = []
    for subject in report["subjects"]:
        rank = subject["features"]["whitened"]
        lines.append(
            f"{subject['name']} ({subject['network']}): effective rank of whitened features "
            f"{rank['effective_rank']:.1f} of {rank['channels']}"
        )
        if not subject["blocks"]:
            lines.append("  has no attention to look at")
            continue
        lines.append("  block   distance, px (least to most)   likeness of heads   diagonal   columns")
        for number, block in enumerate(subject["blocks"]):
            low, high = min(block["distance_px"]), max(block["distance_px"])
            diagonal, columns = (sum(block[name]) / len(block[name]) for name in ("diagonality", "columns"))
            alike = "one head" if block["similarity"] is None else f"{block['similarity']:.3f}"
            lines.append(
                f"  {number:>5}   {low:>12.1f} to {high:<12.1f}   {alike:>17}   {diagonal:>8.3f}   {columns:>7.3f}"
            )
    names = [subject["name"] for subject in report["subjects"]]
    if len(names) > 1:
        lines.append(
            "linear CKA of mean tokens with "
            + names[0]
            + ": "
            + ", ".join(
                f"{name} {value:.3f}"
                for name, value in zip(names[1:], report["cka_of_mean_tokens"][0][1:], strict=True)
            )
        )
    lines += [landscapes.for_a_person(name, one) for name, one in report.get("landscapes", {}).items()]
    return "\n".join(lines)


def pictures(subjects: list[Subject], found: list[Found], together: Together, folder: Path) -> None:
    """features.jpg: maps of some images. heads.png: distance and likeness by depth; offsets.png and average.png: where
    heads look, of the first, middle and last block; blocks.png: how alike blocks are. maps.npz: where heads look."""
    from fdscale.diagnose import plots

    images = [image.permute(1, 2, 0).numpy() / 255 for image in together.images]
    rows = []
    for one in found if images else ():
        maps = one.maps.numpy()
        basis = plots.pca_to_rgb(maps.reshape(-1, maps.shape[-1]))
        rows.append([plots.project(map_, basis) for map_ in maps])
    if images:  # those of the first rank, which may have got none that can be read
        plots.picture_table(
            [images, *rows],
            ["image", *(subject.name for subject in subjects)],
            [""] * len(images),
            "Whitened feature maps",
            "Colours: the three main directions (PCA) of a network's features in these images,\neach network's own.",
            folder / "features.jpg",
        )
    seen = [(subject.name, one.looks) for subject, one in zip(subjects, found, strict=True) if one.looks]
    if not seen:
        return
    by_depth = [
        (name, [look.distance.tolist() for look in looks], [look.likeness() for look in looks]) for name, looks in seen
    ]
    plots.by_depth(by_depth, folder / "heads.png")
    offsets = [(name, [look.offsets.mean(0).numpy() for look in looks]) for name, looks in seen]
    averages = [(name, [look.average.mean(0).numpy() for look in looks]) for name, looks in seen]
    plots.offset_maps(offsets, folder / "offsets.png")
    plots.average_maps(averages, folder / "average.png")
    if together.blocks is not None:
        plots.block_likeness(
            [(name, len(looks)) for name, looks in seen], together.blocks.numpy(), folder / "blocks.png"
        )
    arrays = {
        f"{name}/{kind}/{number}": map_
        for kind, maps in (("offsets", offsets), ("average", averages))
        for name, blocks in maps
        for number, map_ in enumerate(blocks)
    }
    np.savez_compressed(folder / "maps.npz", **arrays)  # type: ignore[arg-type]
