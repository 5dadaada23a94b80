"""The keys of fine-tuning that names the class of every pixel; see `fdscale.keys`."""

from __future__ import annotations

from dataclasses import dataclass

from fdscale.strict import option


@dataclass(frozen=True)
class Segment:
    """Fine-tuning to name the class of every pixel, with UPerNet (arXiv 1807.10221), and its evaluation.

    Defaults are mmsegmentation's for ADE20K. data.image_size is the side of the crops; data.scale and data.ratio are
    left aside.
    """

    classes: int | None = option(
        None, "classes that pixels are told apart by; null: the recipe is for something else", low=1, high=254
    )
    reduce_zero_label: bool = option(
        False, "0 in a mask is no class, and n is class n - 1, as in ADE20K; 255 is no class either way"
    )
    channels: int = option(512, "channels of UPerNet", low=1)
    auxiliary_channels: int = option(256, "channels of the auxiliary head, on the last map but one", low=1)
    auxiliary_weight: float = option(0.4, "factor of the auxiliary head's loss; 0: no such head", low=0.0)
    dropout: float = option(0.1, "probability that a channel is left out before it is scored", low=0.0, high=0.999)
    norm: str = option(
        "batch",
        "of the heads: batch, with statistics of the micro-batches of all ranks; group, 32 groups of channels, for "
        "which it does not matter how a batch is cut",
        choices=("batch", "group"),
    )
    bounds: tuple[int, int] = option(
        (2048, 512),
        "pixels: an image is resized until its long and its short side just fit into these",
        low=8,
        high=16384,
    )
    ratio: tuple[float, float] = option(
        (0.5, 2.0), "training: factor of both, drawn for each image", low=0.05, high=8.0
    )
    most_of_a_class: float = option(
        0.75, "training: the share of a crop that one class may have, if 10 tries find such a crop", low=0.0, high=1.0
    )
    distort: bool = option(True, "training: change brightness, contrast, saturation and hue at random")
    inference: str = option(
        "slide",
        "evaluation: slide, crops of data.image_size whose scores are averaged, or whole, the image at once, for which "
        "a ViT's position tables are not made",
        choices=("slide", "whole"),
        neutral=True,
    )
    stride: int | None = option(
        None, "pixels from one crop to the next; null: two thirds of data.image_size", low=1, neutral=True
    )
    scales: tuple[float, ...] = option(
        (1.0,), "evaluation: factors of bounds, whose probabilities are averaged", low=0.1, high=8.0, neutral=True
    )
    mirror: bool = option(False, "evaluation: average over the mirrored image, too", neutral=True)
    shown: int = option(
        4, "images of an evaluation whose predictions are drawn into the run directory", low=0, neutral=True
    )
