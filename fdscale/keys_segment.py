"""The keys of fine-tuning that names the class of every pixel; see `fdscale.keys`."""

from __future__ import annotations

from dataclasses import dataclass

from fdscale.strict import option


@dataclass(frozen=True)
class Segment:
    """Fine-tuning to name the class of every pixel, with UPerNet (arXiv 1807.10221) or Mask2Former (arXiv 2112.01527),
    and its evaluation.

    Defaults are mmsegmentation's of UPerNet for ADE20K. data.image_size is the side of the crops; data.scale and
    data.ratio are left aside.
    """

    classes: int | None = option(
        None, "classes that pixels are told apart by; null: the recipe is for something else", low=1, high=254
    )
    reduce_zero_label: bool = option(
        False, "0 in a mask is no class, and n is class n - 1, as in ADE20K; 255 is no class either way"
    )
    head: str = option(
        "upernet",
        "upernet, which scores the classes of each pixel, or mask2former, whose queries each predict a mask and its "
        "class; it needs `pip install 'fdscale[mask2former]'`, and leaves the auxiliary head, dropout and norm aside",
        choices=("upernet", "mask2former"),
    )
    queries: int = option(100, "of Mask2Former: masks that are predicted", low=1)
    encoder_layers: int = option(6, "of Mask2Former: layers of deformable attention over the maps", low=1)
    decoder_layers: int = option(9, "of Mask2Former: layers in which queries look at the maps", low=1)
    points: int = option(12544, "of Mask2Former: pixels on which masks are compared, drawn for each", low=4)
    channels: int = option(512, "channels of the head; of Mask2Former a multiple of 32, the authors' is 256", low=1)
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
