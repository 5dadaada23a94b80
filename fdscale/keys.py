"""Every key of a run, with its default, bounds, unit and source, in frozen sections. Nothing here reads or checks.

Fields marked `neutral` do not change the sequence of weights beyond rounding (where the data lies, how much is logged,
how the batch is cut); all others are hashed into every checkpoint and must match on resume.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fdscale.keys_detect import Detect
from fdscale.keys_segment import Segment
from fdscale.strict import option


@dataclass(frozen=True)
class Student:
    """The network that learns."""

    model: str = option(
        "swin_v2", "architecture: swin_v2, vit, or python:MODULE:CLASS for one of your own (docs/tutorial-backbone.md)"
    )
    args: dict[str, Any] = option(
        {}, "constructor arguments, of fdscale.models.swin_v2.SwinV2, fdscale.models.vit.ViT or that class"
    )
    weights: str | None = option(
        None,
        "initial weights: a file, or a run directory, whose newest checkpoint is taken; null: random, as the paper's "
        "students are",
    )
    seed: int = option(0, "seed of initial weights and drop path", low=0, high=2**63 - 1)
    linear: str = option(
        "same",
        "products of the linear layers of its blocks: same, in the engine's precision, or fp8, in 8 bits with a scale "
        "for each tensor (torchao), for GPUs from H100 on and bf16 engines",
        choices=("same", "fp8"),
    )


@dataclass(frozen=True)
class Teacher:
    """The frozen network whose last feature map is learnt."""

    source: str = option("", "timm:NAME, fdscale:swin_v2, fdscale:vit, or python:MODULE:CALLABLE for any torch module")
    args: dict[str, Any] = option({}, "constructor arguments of the teacher")
    weights: str | None = option(None, "local weight file; the word random gives random weights on purpose")
    image_size: int | None = option(None, "pixels; null: the student's view is given as it is", low=8)
    key: str | None = option(
        None, "entry of the weight file that holds the weights, where it has several (EsViT: student)", neutral=True
    )
    feature: str = option(
        "last",
        "which map is learnt: the last after the final norm, or the last of a stride",
        choices=("last", "stride4", "stride8", "stride16", "stride32"),
    )
    mean: tuple[float, float, float] | None = option(
        None, "normalisation of RGB in [0, 1]; null: the one the teacher was trained with"
    )
    std: tuple[float, float, float] | None = option(None, "likewise")
    dtype: str = option("float32", "precision of the teacher's forward", choices=("float32", "bfloat16", "float16"))
    hold: str = option(
        "same",
        "weights of its linear layers in memory: same, in dtype, or int8 or fp8, in 8 bits with a scale for each "
        "output channel; products stay in dtype (docs/teachers.md)",
        choices=("same", "int8", "fp8"),
    )
    resample: str | None = option(
        None,
        "how the teacher's token grid is brought to the student's; null: they must be equal",
        choices=(None, "bilinear", "bicubic", "area"),
    )
    weight: float = option(1.0, "factor of this teacher's loss in the sum of all", low=1e-6)
    whiten: str = option(
        "layer_norm",
        "layer_norm: each token to mean 0 and variance 1 (arXiv 2205.14141); phi_s: rotated, and scaled by one number, "
        "so that over the data each channel has mean 0 and variance 1 (PHI-S, arXiv 2410.01680)",
        choices=("layer_norm", "phi_s"),
    )


@dataclass(frozen=True)
class Objective:
    """Whitened features under smooth-L1 (arXiv 2205.14141, section 3)."""

    beta: float = option(2.0, "transition of smooth-L1 from square to linear; 2.0 in the paper", low=1e-6)
    whiten_samples: int = option(
        4096, "samples, from number 0 on, whose teacher tokens tell phi_s means and covariances", low=2
    )


@dataclass(frozen=True)
class Classify:
    """Fine-tuning as a classifier of images, and its evaluation; distillation leaves all of it aside.

    Defaults as in the official repository's configs/finetune; the augmentations are timm's.
    """

    classes: int | None = option(None, "classes that the head tells apart; null: the recipe distils", low=1)
    head: str = option(
        "fresh",
        "fresh: a new head; loaded: that of student.weights, with the norm before it; or a file of as many class "
        "numbers as there are classes, one a line: these rows of it, as map22kto1k.txt of microsoft/Swin-Transformer",
    )
    head_scale: float = option(1e-3, "factor of a fresh head's initial weights (BEiT's init_scale)", low=0.0)
    label_smoothing: float = option(0.1, "share of each target that all classes get alike", low=0.0, high=0.999)
    mixup: float = option(0.8, "alpha of mixup's Beta distribution; 0: no mixup", low=0.0, high=2.0)
    cutmix: float = option(1.0, "alpha of CutMix's Beta distribution; 0: no CutMix", low=0.0, high=2.0)
    mix_prob: float = option(1.0, "probability that a sample is mixed at all", low=0.0, high=1.0)
    switch_prob: float = option(0.5, "probability of CutMix where both are on", low=0.0, high=1.0)
    mix_group: int = option(
        128,
        "consecutive samples that share lambda and box: 1 each its own, 2 each pair, 128 as in the official batch of a "
        "GPU",
        low=1,
    )
    randaugment: str | None = option("rand-m9-mstd0.5-inc1", "timm's name of a RandAugment policy; null: none")
    erase: float = option(0.25, "probability of random erasing with noise, once per image", low=0.0, high=1.0)
    crop_ratio: float = option(
        0.875, "evaluation: side of the centre crop as a share of the short side", low=0.01, high=1.0, neutral=True
    )
    crops: int = option(
        1,
        "evaluation: views of an image whose probabilities are averaged: 1 the centre, 5 the corners too, 10 all of "
        "them mirrored too",
        choices=(1, 5, 10),
        neutral=True,
    )
    statistics: str = option(
        "training",
        "evaluation: normalisation, that of training (ImageNet's), or clip: CLIP's, with which the official code "
        "evaluates although it trains with ImageNet's",
        choices=("training", "clip"),
        neutral=True,
    )


@dataclass(frozen=True)
class Data:
    """Which images, in which order, seen how."""

    shards: tuple[str, ...] | None = option(
        None, "WebDataset tars: a directory, a glob or a brace pattern, or a list of these", neutral=True
    )
    index: tuple[str, ...] | None = option(
        None, "directory of the index, with data.weights one for each set; null: index/ beside the shards", neutral=True
    )
    weights: tuple[float, ...] | None = option(
        None, "makes each entry of data.shards a set of its own, with this share of the samples; null: all are one set"
    )
    heldout_shards: str | None = option(
        None, "tars, or a folder of class folders, only evaluated on; null: no held-out loss", neutral=True
    )
    heldout_index: str | None = option(None, "directory of their index; null: index/ beside them", neutral=True)
    heldout_samples: int | None = option(
        5000, "samples: evaluate on the first so many of the held-out set; null: on all", low=1, neutral=True
    )
    seed: int = option(0, "seed of sample order and augmentation", low=0, high=2**63 - 1)
    lanes: int | None = option(
        None, "sequential readers that the order is woven from; null: chosen from batch and shards", low=1
    )
    block: int = option(4096, "samples: rows of a lane that are shuffled together", low=1)
    image_size: int = option(224, "pixels: side of the square view", low=8)
    scale: tuple[float, float] = option(
        (0.08, 1.0), "area of the random crop as a share of the image", low=0.0, high=1.0
    )
    ratio: tuple[float, float] = option((0.75, 4 / 3), "aspect ratio of the random crop", low=0.01)
    interpolation: str = option(
        "bilinear", "resize filter; the official distillation uses bilinear", choices=("bilinear", "bicubic")
    )
    flip: float = option(0.5, "probability of a horizontal flip", low=0.0, high=1.0)
    decode: str = option(
        "exact",
        "exact: every pixel as Pillow decodes it; scaled: large JPEGs at a fraction of their size where the view is at "
        "most half the crop; pillow: Pillow's own crop and resize (slow)",
        choices=("exact", "scaled", "pillow"),
    )
    workers: int = option(4, "decoding processes per rank; 0: in the training process", low=0, neutral=True)
    prefetch: int = option(2, "micro-batches each worker prepares ahead", low=1, neutral=True)
    shard_cache: str | None = option(
        None,
        "directory on a local disk for shards from elsewhere; null: one of yours in the system's temporary directory",
        neutral=True,
    )
    shard_cache_gib: float = option(64.0, "GiB that it may hold, for all ranks of a machine", low=0.0, neutral=True)
    fetch_parallel: int = option(4, "shards that each rank fetches ahead at a time", low=1, neutral=True)
    fetch_tries: int = option(8, "attempts in a row at a shard before its source counts as down", low=1, neutral=True)
    fetch_timeout_s: float = option(
        30.0, "seconds until a source that sends nothing counts as failed", low=0.1, neutral=True
    )
    lost_budget: float = option(
        1e-3,
        "share of the samples since the start (of 10 000 at least) that may be damaged and replaced; above it the run "
        "stops",
        low=0.0,
        high=1.0,
        neutral=True,
    )


@dataclass(frozen=True)
class Optim:
    """AdamW (official repository, models/feature_distillation configs)."""

    batch_size: int = option(2048, "samples per step over all ranks", low=1)
    lr: float = option(1.2e-3, "peak learning rate, already scaled to the batch", low=0.0)
    weight_decay: float = option(0.05, "decoupled weight decay of matrices", low=0.0)
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW moment decays", low=0.0, high=0.999999)
    eps: float = option(1e-8, "AdamW epsilon", low=0.0)
    clip_grad: float = option(3.0, "global gradient norm bound; 0: none", low=0.0)
    fused: str = option(
        "auto",
        "whose fused AdamW updates the weights: torch, apex (NVIDIA's), or auto: apex on a GPU where it can be had",
        choices=("auto", "torch", "apex"),
        neutral=True,
    )
    ema: float | None = option(
        None,
        "decay of a moving average of the weights that is kept beside them, such as 0.9999; null: none",
        low=0.0,
        high=0.99999999,
    )
    layer_decay: float = option(
        1.0, "learning rate factor per layer from the output to the input; 1: none", low=1e-3, high=1.0
    )


@dataclass(frozen=True)
class Schedule:
    """The learning rate, with linear warm-up; lengths in steps, or in epochs of the data."""

    shape: str = option(
        "cosine",
        "cosine, as timm's CosineLRScheduler; poly, mmsegmentation's: (1 - step / steps) ^ power; or steps, a tenth "
        "from each of schedule.drops on",
        choices=("cosine", "poly", "steps"),
    )
    drops: tuple[float, ...] = option((0.75, 11 / 12), "shares of the run after which steps falls", low=0.0, high=1.0)
    power: float = option(1.0, "exponent of poly; 1: linear", low=0.0)
    steps: int | None = option(None, "steps of the whole run", low=1)
    epochs: float | None = option(None, "the same in epochs", low=0.0)
    warmup_steps: int | None = option(None, "steps of linear warm-up", low=0)
    warmup_epochs: float | None = option(None, "the same in epochs", low=0.0)
    warmup_lr: float = option(0.0, "learning rate at step 0", low=0.0)
    min_lr: float = option(0.0, "learning rate at the end", low=0.0)


@dataclass(frozen=True)
class Memory:
    """How a step is cut to fit; none of it changes what is learnt."""

    micro_batch: int = option(128, "samples per forward on one rank", low=1, neutral=True)
    checkpoint: tuple[str, ...] = option(
        ("none",),
        "activation checkpointing of the blocks: none, torch, selective (torch's, without computing attention again), "
        "deepspeed or fairscale, torch_offload or fairscale_offload, which keep blocks' inputs in host memory; one "
        "value, or one per stage",
        choices=("none", "torch", "torch_offload", "selective", "deepspeed", "fairscale", "fairscale_offload"),
        neutral=True,
    )
    attention_chunk: tuple[int, ...] = option(
        (0,),
        "sequential self-attention: windows (SwinV2) or heads (ViT) at a time, 0: all at once; one value, or one per "
        "stage (SwinV2 paper, 3.4); of window attention, only the reference needs it",
        low=0,
        neutral=True,
    )
    kernels: str = option(
        "auto",
        "what computes window attention (docs/kernels.md): reference, torch, which keeps no scores for the backward, "
        "triton or cuda (once built), for NVIDIA GPUs, where norms and loss are fused too, or auto: on a GPU cuda or "
        "triton, the first that can run and passes a self-check, else reference; FDSCALE_KERNELS overrides it",
        choices=("auto", "reference", "torch", "triton", "cuda"),
        neutral=True,
    )
    teacher: str = option(
        "replicated",
        "replicated: whole on every rank; sharded: each rank holds its share of every block of a teacher, which is "
        "gathered when it computes",
        choices=("replicated", "sharded"),
        neutral=True,
    )
    compile: tuple[str, ...] = option(
        ("none",),
        "what torch.compile compiles, for up to minutes at first use: none, or one or both of student (each of its "
        "blocks, under every ZeRO stage) and teacher",
        choices=("none", "student", "teacher"),
        neutral=True,
    )


@dataclass(frozen=True)
class Cache:
    """Teacher features written once, by `fdscale cache`, and replayed ever after."""

    epochs: float | None = option(
        None,
        "after so many epochs, whole or not, samples and their augmentation repeat, so that features written for them "
        "serve the whole run; the live teacher repeats them too; null: never",
        low=1e-9,
    )
    dtype: str = option(
        "same",
        "precision of the target: same (float32, as the teacher gives it), bfloat16, int8 or float8 (one scale per "
        "token); the live teacher's is rounded likewise",
        choices=("same", "bfloat16", "int8", "float8"),
    )
    features: str | None = option(None, "directory that `fdscale cache` wrote; null: the live teacher", neutral=True)
    file_mib: int = option(1024, "MiB: size of the files that `fdscale cache` writes", low=1, neutral=True)


@dataclass(frozen=True)
class Save:
    """Checkpoints."""

    every: int = option(1000, "steps between checkpoints; the end of a run is always saved", low=1, neutral=True)
    keep: int = option(3, "newest checkpoints that are kept", low=1, neutral=True)
    keep_every: int | None = option(
        None, "steps: those at a multiple are kept for ever; null: none", low=1, neutral=True
    )
    failures: int = option(
        3, "saves in a row that may fail, as on a full disk; then the run stops", low=1, neutral=True
    )


@dataclass(frozen=True)
class Guard:
    """When training that goes wrong goes back to an earlier checkpoint, and when it is given up as hung."""

    spike: float = option(
        3.0, "a loss above so many times the median of the window is a spike; 0: off", low=0.0, neutral=True
    )
    spike_steps: int = option(3, "spikes in a row that make the run go back", low=1, neutral=True)
    window: int = option(100, "steps whose median loss is the usual one", low=1, neutral=True)
    skips: int = option(10, "skipped steps in a row that are borne; more make the run go back", low=0, neutral=True)
    rollbacks: int = option(3, "times that a run goes back; then it ends as diverged", low=0, neutral=True)
    step_limit_s: float = option(
        900.0,
        "seconds: a step that takes longer hangs; the run names the rank that is late and ends, for a requeue to go "
        "on; 5 times as long for the start, evaluations, rollbacks and the last save; 0: never",
        low=0.0,
        neutral=True,
    )


@dataclass(frozen=True)
class Log:
    """What is written about a run."""

    every: int = option(10, "steps between log lines", low=1, neutral=True)
    heldout_every: int = option(1000, "steps between held-out evaluations", low=1, neutral=True)
    samples: bool = option(False, "write one line per sample (number, shard, key) to samples-RANK.log", neutral=True)
    tensorboard: bool = option(True, "write TensorBoard events when tensorboard is installed", neutral=True)
    wandb: str | None = option(None, "Weights & Biases project; null: off", neutral=True)


@dataclass(frozen=True)
class Config:
    """A complete run."""

    student: Student = field(default_factory=Student)
    teacher: Teacher = field(default_factory=Teacher)
    teachers: dict[str, Teacher] = field(default_factory=dict)  # several by name, and then no `teacher`
    objective: Objective = field(default_factory=Objective)
    classify: Classify = field(default_factory=Classify)
    segment: Segment = field(default_factory=Segment)
    detect: Detect = field(default_factory=Detect)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    memory: Memory = field(default_factory=Memory)
    cache: Cache = field(default_factory=Cache)
    save: Save = field(default_factory=Save)
    guard: Guard = field(default_factory=Guard)
    log: Log = field(default_factory=Log)
