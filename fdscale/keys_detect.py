"""The keys of fine-tuning that finds objects; see `fdscale.keys`."""

from __future__ import annotations

from dataclasses import dataclass

from fdscale.strict import option


@dataclass(frozen=True)
class Detect:
    """Fine-tuning to find objects, with boxes and masks, and its evaluation.

    data.image_size is the side of the square into which every image is fitted; data.scale and data.ratio are left
    aside.
    """

    classes: int | None = option(None, "classes of objects; null: the recipe is for something else", low=1, high=10000)
    kind: str = option(
        "mask_rcnn",
        "mask_rcnn (arXiv 1703.06870), cascade (Cascade R-CNN, 1906.09756), or htc (Hybrid Task Cascade, 1901.07518)",
        choices=("mask_rcnn", "cascade", "htc"),
    )
    masks: bool = option(True, "learn masks, too; false: boxes alone, as Objects365 has them")
    channels: int = option(256, "channels of the feature pyramid", low=8)
    box_head: str = option(
        "2fc", "in front of the classes of a box: two layers, or four convolutions and one layer",
        choices=("2fc", "4conv1fc"),
    )  # fmt: skip
    norm: str = option(
        "none",
        "of the convolutions of pyramid and heads: none, or group, groups of channels",
        choices=("none", "group"),
    )
    box_loss: str = option("smooth_l1", "of boxes: smooth_l1, of their codes, or giou", choices=("smooth_l1", "giou"))
    stuff: int = option(
        0, "htc: classes of pixels that a semantic branch learns from .seg.png; 0: no such branch", low=0, high=254
    )
    head: str = option(
        "fresh",
        "what stands behind the backbone begins fresh, or as far as it fits with what student.weights, another "
        "detector, has: fitting",
        choices=("fresh", "fitting"),
    )
    global_block: bool = option(False, "one more block of self-attention over all of the last map (HTC++ of Swin)")
    bounds: tuple[int, int] | None = option(
        None,
        "pixels: a whole image is resized until its long and its short side just fit into these; null: into the square",
        low=8,
        high=16384,
    )
    resize: str = option(
        "jitter",
        "training: jitter, the image fitted into the square times a factor and a random part of it, or short_side, the "
        "whole image with a random short side",
        choices=("jitter", "short_side"),
    )
    jitter: tuple[float, float] = option((0.1, 2.0), "training: the factor of jitter", low=0.01, high=8.0)
    short_side: tuple[int, int] = option((480, 800), "training: pixels of the short side", low=8, high=16384)
    instaboost: float = option(
        0.0,
        "training: probability that the objects of an image are moved, turned and resized a little where they are "
        "(InstaBoost, arXiv 1908.07801)",
        low=0.0,
        high=1.0,
    )
    suppress: str = option(
        "hard", "evaluation: how overlapping boxes of a class are thinned out: hard, linear or gaussian (soft-NMS)",
        choices=("hard", "linear", "gaussian"), neutral=True,
    )  # fmt: skip
    overlap: float = option(
        0.5, "evaluation: intersection over union above which they are", low=0.0, high=1.0, neutral=True
    )
    least_score: float = option(
        0.05, "evaluation: the score below which a box is left out", low=0.0, high=1.0, neutral=True
    )
    most: int = option(100, "evaluation: boxes of an image", low=1, neutral=True)
    scales: tuple[float, ...] = option(
        (1.0,),
        "evaluation: factors of detect.bounds, or of data.image_size without, whose detections are merged",
        low=0.1,
        high=8.0,
        neutral=True,
    )
    mirror: bool = option(False, "evaluation: merge with those of the mirrored image, too", neutral=True)
    shown: int = option(
        4, "images of an evaluation whose predictions are drawn into the run directory", low=0, neutral=True
    )
