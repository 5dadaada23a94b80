"""Brightness, contrast, saturation and hue, changed at random: mmsegmentation's PhotoMetricDistortion.

Images are (3, H, W) RGB, uint8 outside and float32 from 0 to 255 inside; hue is in degrees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BRIGHTNESS = 32.0  # the most that is added
FACTORS = (0.5, 1.5)  # of contrast, and of saturation
HUE = 36.0  # degrees: 18 of OpenCV's 180


def distorted(image: Tensor, draws: Sequence[float]) -> Tensor:
    """The image (3, H, W) uint8, changed by nine draws in [0, 1).

    Each of the four changes is made where its first draw is below one half, to the extent that its second says:
    brightness 0 and 1, contrast 2 and 3, saturation 4 and 5, hue 6 and 7. Draw 8: contrast before the colours or after.
    """
    brighter, contrasted, saturated, turned = (draw < 0.5 for draw in draws[0:8:2])
    low, high = FACTORS

    def contrast(x: Tensor) -> Tensor:
        return _clipped(x.float() * (low + (high - low) * draws[3])) if contrasted else x

    if brighter:
        image = _clipped(image.float() + BRIGHTNESS * (2 * draws[1] - 1))
    first = draws[8] < 0.5
    image = contrast(image) if first else image
    if saturated or turned:
        factor = low + (high - low) * draws[5] if saturated else 1.0
        image = recoloured(image, factor, HUE * (2 * draws[7] - 1) if turned else 0.0)
    return image if first else contrast(image)


def recoloured(image: Tensor, saturation: float, turn: float) -> Tensor:
    """(3, H, W) uint8 with its saturation (HSV) times a factor, at most full, and its hue turned by so many degrees."""
    wide = image.float()
    value, low = wide.amax(0), wide.amin(0)
    chroma = value - low
    red, green, blue = wide.unbind(0)
    spread = chroma.clamp_min(1e-6)
    hue = torch.where(
        value == red,
        (green - blue) / spread % 6,
        torch.where(value == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )  # of 6
    hue = hue + turn / 60
    chroma = (chroma * saturation).minimum(value)
    # Each of red, green and blue by its distance from the hue (CSS Color 4, HSV in closed form).
    sixth = (torch.tensor([5.0, 3.0, 1.0], device=wide.device)[:, None, None] + hue) % 6
    return _clipped(value - chroma * torch.minimum(sixth, 4 - sixth).clamp(0, 1))


def _clipped(image: Tensor) -> Tensor:
    return image.round().clamp(0, 255).to(torch.uint8)
