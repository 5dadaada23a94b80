"""The student network of a config, alone or as a classifier: built on the meta device, its weights, what it costs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdscale import UserError, config, dist
from fdscale.engine import checkpoint, fp8, memory
from fdscale.engine.contents import Damaged
from fdscale.engine.initialize import materialise
from fdscale.engine.metrics import Work
from fdscale.engine.reader import Reader
from fdscale.engine.state import EMA
from fdscale.kernels import attention, check
from fdscale.models import backbone as build_backbone
from fdscale.models import convert
from fdscale.models.layers import ResidualNorm, initial_value
from fdscale.tasks.classification import Classifier
from fdscale.tasks.detection import Detector, Thinning
from fdscale.tasks.segmentation import Segmenter

RESIZED = ("relative_position_bias_table", "pos_embed")  # what follows the image size, see `convert.fitted`
PREFIX = "backbone."  # of the student's parameters in the module that is trained, and in its checkpoints


def backbone(settings: config.Config) -> Any:
    """The network alone, on the meta device."""
    with torch.device("meta"):
        return build_backbone(settings.student.model, {"img_size": settings.data.image_size, **settings.student.args})


def build(settings: config.Config, training: bool = True) -> Any:
    """The backbone to compute with: with its memory policies and the seed of its drop path.

    training: False: without what only makes training faster, 8-bit products and compiling. Raises UserError
    where memory.kernels, or the environment, asks for what cannot run here.
    """
    student = backbone(settings)
    student.drop_path_seed = settings.student.seed
    if training and settings.student.linear == "fp8":
        fp8.convert(student.blocks(), dist.device())
    policy = settings.memory
    kernels = attention.choose(policy.kernels, dist.device())
    fused = check.fuses(policy.kernels, dist.device())
    memory.apply(
        student, policy.checkpoint, policy.attention_chunk, kernels, fused, training and "student" in policy.compile
    )
    return student


def about_kernels(backbone: Any) -> list[str]:
    """Lines for a person: what computes the window attention of each stage, and the norms behind branches."""
    lines = []
    blocks = backbone.blocks()
    firsts: list[Any] = [
        getattr(blocks[sum(backbone.depths[:stage])], "attn", None) for stage in range(len(backbone.depths))
    ]
    if hasattr(firsts[0], "kernels"):
        parts = []
        for kernels, group in itertools.groupby(enumerate(firsts, 1), lambda numbered: numbered[1].kernels):
            stages = list(group)
            numbers = sorted({stages[0][0], stages[-1][0]})
            windows = ", ".join(" x ".join(map(str, dict.fromkeys(attn.window))) for _, attn in stages)
            parts.append(
                f"stage{'s' * (len(stages) > 1)} {'-'.join(map(str, numbers))} by {kernels} "
                f"(window{'s' * (len(stages) > 1)} {windows})"
            )
        lines.append(f"window attention: {', '.join(parts)}")
    if emulated := fp8.describe(backbone):
        lines.append(emulated)
    if norms := [module for module in backbone.modules() if isinstance(module, ResidualNorm)]:
        lines.append(f"residual and norm: {by(norms[0].fused)}")
    return lines


def by(fused: bool) -> str:
    """What computes one of the ops of kernels/rows.py, for a person."""
    return "fused, by triton" if fused else "by torch"


def build_labelled(settings: config.Config, student: Any) -> Any:
    """A backbone with what the task of a recipe for fine-tuning puts behind it, on the meta device."""
    builds = {"finetune": build_classifier, "segment": build_segmenter, "detect": build_detector}
    return builds[config.task_of(settings)](settings, student)


def build_classifier(settings: config.Config, student: Any) -> Classifier:
    """A backbone with a head for `classify.classes`, on the meta device."""
    assert settings.classify.classes is not None
    with torch.device("meta"):
        return Classifier(student, settings.classify.classes, settings.classify.head_scale)


def build_segmenter(settings: config.Config, student: Any) -> Any:
    """A backbone with UPerNet or Mask2Former for `segment.classes`, on the meta device.

    Raises UserError where what the latter is made of is missing.
    """
    segment = settings.segment
    assert segment.classes is not None
    if segment.head == "mask2former":
        try:
            from fdscale.tasks.mask2former import Mask2Former  # imports another library, which takes seconds
        except ImportError as error:
            raise UserError(
                f"segment.head is mask2former, and its parts cannot be imported ({error}): pip install "
                "'fdscale[mask2former]', or --set segment.head=upernet"
            ) from None
        sizes = (segment.channels, segment.queries, segment.encoder_layers, segment.decoder_layers, segment.points)
        with torch.device("meta"):
            return Mask2Former(student, segment.classes, *sizes, settings.student.seed)
    with torch.device("meta"):
        return Segmenter(
            student,
            segment.classes,
            segment.channels,
            segment.auxiliary_channels,
            segment.auxiliary_weight,
            segment.dropout,
            segment.norm,
            settings.student.seed,
        )


def build_detector(settings: config.Config, student: Any) -> Detector:
    """A backbone with a pyramid and heads for `detect.classes`, on the meta device."""
    detect = settings.detect
    assert detect.classes is not None
    with torch.device("meta"):
        return Detector(
            student,
            detect.classes,
            detect.kind,
            masks=detect.masks,
            channels=detect.channels,
            box_head=detect.box_head,
            norm=detect.norm,
            box_loss=detect.box_loss,
            stuff=detect.stuff,
            global_block=detect.global_block,
            seed=settings.student.seed,
            thinning=Thinning(detect.suppress, detect.overlap, detect.least_score, detect.most),
        )


def initial_values(settings: config.Config, module: Any) -> Callable[[str, torch.Size], Tensor]:
    """First value of every parameter: from `student.weights` where there are any, else random by seed and name.

    A head is random unless `classify.head`, or `detect.head`, says otherwise.
    """
    loaded: dict[str, Callable[[], Tensor]] = {}
    if settings.student.weights:
        weights = read_weights(settings.student.weights)
        loaded = trained_backbone(settings, weights)
        if config.task_of(settings) == "finetune" and settings.classify.head != "fresh":
            loaded |= trained_head(module, weights, head_rows(settings))
        if config.task_of(settings) == "detect" and settings.detect.head == "fitting":
            loaded |= fitting_heads(module, weights)

    def value(name: str, shape: torch.Size) -> Tensor:
        if name in loaded:
            return loaded[name]()
        return initial_value(module, name, shape, torch.float32, settings.student.seed)

    return value


class Weights(NamedTuple):
    """Tensors by whatever names they have, and the config of the run that they are of, if they are of one.

    Large ones are read when they are needed: what a file holds is mapped, and of a checkpoint they are on the meta
    device, with `later` to read them (by `id`). Buffers of a checkpoint are among them.
    """

    tensors: dict[str, Tensor]
    run: config.Config | None = None
    later: dict[int, Callable[[], Tensor]] = {}  # noqa: RUF012 - never changed

    def whole(self, tensor: Tensor) -> Tensor:
        """One of the tensors, or what was made of one, in float32 and in memory of its own."""
        return self.later[id(tensor)]() if tensor.is_meta else tensor.to(torch.float32, copy=True)


def trained_backbone(settings: config.Config, weights: Weights) -> dict[str, Callable[[], Tensor]]:
    """What reads each parameter of the backbone of a config, by its name in training, in float32.

    Position tables are resized to its image size. Raises UserError where the weights do not fit, or where a SwinV2's
    windows were others.
    """
    trained = None if weights.run is None else backbone(weights.run)
    _, fitted = convert.fitted(backbone(settings), weights.tensors, trained)
    return {f"{PREFIX}{name}": functools.partial(weights.whole, tensor) for name, tensor in fitted.items()}


def trained_head(module: nn.Module, weights: Weights, rows: list[int] | None = None) -> dict[str, Callable[[], Tensor]]:
    """The same of what a classifier or segmenter has besides its backbone, from weights under ours, BEiT's, official
    Swin's or timm's names.

    rows: of the classes of the weights, those to take. Raises UserError where they are missing or do not fit.
    """
    values: dict[str, Callable[[], Tensor]] = {}
    for name, parameter in module.named_parameters():
        if name.startswith(PREFIX):
            continue
        value = weights.tensors.get(name, weights.tensors.get(name.replace("head.", "head.fc.")))
        if value is not None and rows is not None and name.startswith("head."):
            if max(rows) >= len(value):
                raise UserError(f"classify.head names class {max(rows)}, and the head of the weights has {len(value)}")
            value = value[torch.tensor(rows)]
        _check_fit(name, value, parameter, module)
        assert value is not None
        values[name] = functools.partial(weights.whole, value)
    return values


def fitting_heads(module: nn.Module, weights: Weights) -> dict[str, Callable[[], Tensor]]:
    """The same, of what has the name and shape of ours in the weights.

    Raises UserError where nothing has: they are of no detector.
    """
    values: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(weights.whole, weights.tensors[name])
        for name, parameter in module.named_parameters()
        if not name.startswith(PREFIX) and name in weights.tensors and weights.tensors[name].shape == parameter.shape
    }
    if not values:
        raise UserError(
            "detect.head is fitting, and student.weights hold nothing that fits behind the backbone: give a run of "
            "detection, or detect.head=fresh"
        )
    return values


def fill_buffers(module: nn.Module, weights: Weights) -> None:
    """Give the persistent buffers of a classifier or segmenter their values, those of batch-norms.

    Raises UserError where they are missing or do not fit.
    """
    persistent = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in persistent:
            _check_fit(name, weights.tensors.get(name), buffer, module)
            buffer.copy_(weights.tensors[name])


def _check_fit(name: str, value: Tensor | None, wanted: Tensor, module: nn.Module) -> None:
    if value is None or value.shape != wanted.shape:
        what = "are missing" if value is None else f"have the shape {tuple(value.shape)}"
        kind = type(module).__name__.lower()
        section = {"segmenter": "segment", "mask2former": "segment", "detector": "detect"}.get(kind, "classify")
        raise UserError(
            f"the weights of {name} {what}; expected {tuple(wanted.shape)}: give weights of a whole {kind} of as many "
            f"classes as {section}.classes says"
        )


def head_rows(settings: config.Config) -> list[int] | None:
    """The numbers in the file that `classify.head` names; None where it names none. Raises UserError."""
    head, classes = settings.classify.head, settings.classify.classes
    if head in ("fresh", "loaded"):
        return None
    try:
        words = Path(head).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"classify.head: expected fresh, loaded, or a file that can be read ({head}: {error})"
        ) from None
    if len(words) != classes or not all(word.isdecimal() for word in words):
        raise UserError(
            f"{head}: expected {classes} class numbers, one a line (classify.classes), and found {len(words)}"
        )
    return [int(word) for word in words]


def loaded(
    settings: config.Config, weights: Path | str, averaged: bool = False, precision: torch.dtype = torch.float32
) -> nn.Module:
    """A backbone and its head with the weights of a checkpoint, or of a file, on this rank's device, for evaluation."""
    module = build_labelled(settings, build(settings, training=False))
    memory.agree_on_kernels(module)
    file = read_checkpoint(weights, averaged) if isinstance(weights, Path) else read_weights(weights)
    values = trained_backbone(settings, file) | trained_head(module, file)
    fill_buffers(module, file)
    materialise(module, lambda name, shape: values[name](), precision, dist.device())
    return module.to(dist.device()).eval()


def loaded_backbone(settings: config.Config, weights: Path | str) -> Any:
    """A backbone alone, in float32, with the weights of a checkpoint, or of a file, on this rank's device."""
    network = build(settings, training=False)
    memory.agree_on_kernels(network)
    file = read_checkpoint(weights) if isinstance(weights, Path) else read_weights(weights)
    values = trained_backbone(settings, file)
    materialise(network, lambda name, shape: values[f"{PREFIX}{name}"](), torch.float32, dist.device())
    return network.to(dist.device()).eval()


def find(
    source: str, run: str | None, weights: str | None, overrides: Sequence[str]
) -> tuple[config.Config, Path | None]:
    """The config, and the checkpoint that is evaluated, None where it is a file of weights; a collective."""
    if run is not None and weights is not None:
        raise UserError("give --run or --weights, not both")
    found = None
    if is_run(Path(source)):
        if run is not None:
            raise UserError(f"{source} is a run itself; leave out --run, or give a recipe with it")
        found = find_checkpoint(Path(source))
        settings = config.from_dict(checkpoint.read_state(found)["config"], str(found), overrides)
    else:
        if "/" in source and not Path(source).exists():
            raise UserError(f"{source}: no such run directory or recipe file")
        settings = config.load(source, overrides)
        if run is not None:
            found = find_checkpoint(Path(run))
        elif weights is None:
            raise UserError(f"{source} is a recipe: say whose weights, with --run DIR or --weights FILE")
    return settings, (found if weights is None else None)


def read_weights(source: str) -> Weights:
    """The weights in a file or a directory of safetensors, or of a run: those of its newest valid checkpoint."""
    if not is_run(Path(source)):
        return Weights(convert.read(source))
    found = find_checkpoint(Path(source))
    if dist.rank() == 0:
        print(f"weights of {found}", file=sys.stderr)
    return read_checkpoint(found)


def read_checkpoint(found: Path, averaged: bool = False) -> Weights:
    """All weights of a checkpoint, or their averages; those of parameters that were frozen have none.

    Raises UserError where it is damaged or holds no average.
    """
    tensors: dict[str, Tensor] = {}
    later: dict[int, Callable[[], Tensor]] = {}
    try:
        with contextlib.closing(Reader(found)) as reader:
            if averaged and EMA not in reader.state["keys"]:
                raise UserError(f"{found} holds no average of the weights: the run had no optim.ema")
            run = config.from_dict(reader.state["config"], str(found / "state.json"))
            for name, shape in reader.state["parameters"].items():
                key = EMA if averaged and EMA in reader.keys(name) else "fp32"
                if name.startswith(PREFIX) and not name.endswith(RESIZED):
                    tensors[name] = torch.empty(tuple(shape), device="meta")
                    later[id(tensors[name])] = functools.partial(_read_one, reader, found, name, key)
                else:
                    tensors[name] = reader.full(name, key)
            return Weights(tensors | dict(reader.buffers()), run, later)
    except Damaged as damage:
        raise UserError(f"{found}: {damage}") from None


def _read_one(reader: Reader, found: Path, name: str, key: str) -> Tensor:
    """A parameter, from files that are opened again."""
    try:
        with contextlib.closing(reader):
            return reader.full(name, key)
    except Damaged as damage:
        raise UserError(f"{found}: {damage}") from None


def is_run(path: Path) -> bool:
    """Whether this is a run directory or a checkpoint directory, and no weight file."""
    return (path / "checkpoints").is_dir() or os.path.lexists(path / "manifest.json")


def find_checkpoint(source: Path) -> Path:
    """The checkpoint meant by a run directory or a checkpoint directory; a collective.

    Raises UserError where there is no valid one.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such run or checkpoint directory")
    if os.path.lexists(source / "manifest.json"):
        problem = checkpoint.verify_together(source)
        if problem:
            raise UserError(f"{source}: {problem}")
        return source
    found, skipped = checkpoint.newest_valid(source / "checkpoints")
    if found is None:
        raise UserError(f"{source} holds no valid checkpoint{': ' + skipped[0] if skipped else ''}")
    for line in skipped if dist.rank() == 0 else ():
        print(line, file=sys.stderr)
    return found


def work_per_image(settings: config.Config, student: Any, teacher_flops: int = 0, heads: int = 0) -> Work:
    """FLOPs of training on one image, for MFU. teacher_flops: multiply-adds of a teacher that runs beside; heads: of
    what stands behind the backbone."""
    size = (settings.data.image_size,) * 2
    forward = 2 * student.flops(size)
    kinds = memory.per_stage(settings.memory.checkpoint, student.depths, "memory.checkpoint")
    # Blocks of a stage are alike, and in these networks stages cost nearly the same per block.
    recomputed = forward * sum(kind != "none" for kind in kinds) // len(kinds)
    return Work(student=3 * (forward + 2 * heads), teacher=2 * teacher_flops, recomputed=recomputed)
