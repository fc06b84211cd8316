"""Random changes of training pictures: flip, crop and colour."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fedlora.errors import FedloraError

# What each column of the draws decides: always the same, so that turning one change on leaves the
# others as they were.
_FLIP, _AREA, _RATIO, _TOP, _LEFT, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(9)
NUM_DRAWS = 9
# Values in float32 at a time (1 MiB): bounds the memory beside the result, and stays in cache.
_CHUNK = 2**18


class Augmentation:
    """Random changes of training pictures, in this order: crop, flip, colour.

    What happens to a picture depends on its own numbers alone, which :meth:`draw` makes: not on the
    pictures beside it, the size of the batch or the number of threads, to the bit.

    The defaults are mild: a crop of at least half of the picture and a flip, as Tip-Adapter (Zhang
    et al., ECCV 2022, main.py) trains CLIP on few pictures. Colours are left alone, since they may
    be what tells classes apart (flowers, stained tissue, satellite pictures). Set ``flip=0`` for
    whatever changes its meaning in a mirror, such as digits, handwriting and signs.

    The definitions are torchvision's (``RandomResizedCrop``, ``RandomHorizontalFlip`` and
    ``ColorJitter`` in torchvision/transforms), but for these: a box is never drawn again, see
    ``crop_ratio``; colours change in a fixed order; there is one rounding, at the end.

    Args:
        flip: probability of turning left and right round.
        crop_scale: smallest and largest area of the box that is cut out and resized (bilinear) back
            to the picture's size, as parts of the picture's area; uniform. None cuts nothing.
        crop_ratio: smallest and largest width / height of the box; its logarithm is uniform. For
            each area only ratios are drawn whose box fits into the picture, where torchvision draws
            area and ratio again until one fits. If no ratio does, the one nearest to fitting is
            taken, and the box shrinks until it fits.
        brightness: x >= 0, 0 for off: pixels are multiplied by a factor uniform in [1 - x, 1 + x],
            never below 0.
        contrast: the same for the difference from the mean of the grey picture.
        saturation: the same for the difference from the grey picture.
        hue: x from 0 to 0.5, 0 for off: hue turns by a part of a whole turn uniform in [-x, x].

    Raises:
        FedloraError: if a value is out of range.

    Example:
        >>> augmentation = Augmentation(flip=1, crop_scale=None)
        >>> images = torch.arange(6, dtype=torch.uint8).reshape(1, 3, 1, 2)
        >>> augmentation.augment(images, augmentation.draw(1, seed=0)).flatten().tolist()
        [1, 0, 3, 2, 5, 4]
    """

    def __init__(
        self,
        flip: float = 0.5,
        crop_scale: tuple[float, float] | None = (0.5, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
    ) -> None:
        self.flip = _number("flip", flip, 1)
        self.crop_scale = None if crop_scale is None else _range("crop_scale", crop_scale, 1)
        self.crop_ratio = _range("crop_ratio", crop_ratio, math.inf)
        self.brightness = _number("brightness", brightness, math.inf)
        self.contrast = _number("contrast", contrast, math.inf)
        self.saturation = _number("saturation", saturation, math.inf)
        self.hue = _number("hue", hue, 0.5)

    def draw(self, count: int, seed: int) -> Tensor:
        """The random numbers of an epoch.

        Args:
            count: pictures in the epoch.
            seed: from 0 to 2**63, the epoch's own.

        Returns:
            (count, NUM_DRAWS), float32, uniform in [0, 1): one row per picture.
        """
        return torch.rand(count, NUM_DRAWS, generator=torch.Generator().manual_seed(seed))

    def augment(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change pictures.

        Args:
            images: (n, 3, H, W), uint8, on the CPU; stays as it is.
            draws: (n, NUM_DRAWS), the rows of :meth:`draw` that belong to them.

        Returns:
            (n, 3, H, W), uint8; ``images`` itself where nothing can change.

        Raises:
            ValueError: if ``images`` or ``draws`` is of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                "images must be uint8 of shape (n, 3, H, W), got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        if draws.shape != (len(images), NUM_DRAWS):
            raise ValueError(
                f"draws must be one row of {NUM_DRAWS} per picture, ({len(images)}, {NUM_DRAWS}), "
                f"got {tuple(draws.shape)}. Take those rows of draw() that belong to the pictures."
            )
        if self.flip or self.crop_scale is not None:
            images = self._move(images, draws)
        if self.brightness or self.contrast or self.saturation or self.hue:
            images = self._recolour(images, draws)
        return images

    def _move(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop and flip."""
        out = torch.empty_like(images)
        size = images.shape[2], images.shape[3]
        for image, place, row in zip(images, out, draws.tolist(), strict=True):
            top, left, height, width = self._box(*size, row)
            changed = image[:, top : top + height, left : left + width]
            if (height, width) != size:
                # As uint8 and one by one: unlike on floats, the bits are the same on any number of
                # threads, and it is the fastest way too.
                changed = interpolate(changed[None], size, mode="bilinear")[0]
            place.copy_(changed.flip(-1) if row[_FLIP] < self.flip else changed)
        return out

    def _box(self, height: int, width: int, row: list[float]) -> tuple[int, int, int, int]:
        """Top, left, height and width of what is cut out, in pixels."""
        if self.crop_scale is None:
            return 0, 0, height, width
        low, high = self.crop_scale
        part = low + (high - low) * row[_AREA]
        # A box of this area is at most as wide, or as high, as the picture between these ratios.
        narrow, wide = part * width / height, width / (part * height)
        least, most = self.crop_ratio
        narrow, wide = min(max(narrow, least), most), max(min(wide, most), least)
        ratio = narrow * (wide / narrow) ** row[_RATIO]
        area = part * height * width
        cut_height, cut_width = math.sqrt(area / ratio), math.sqrt(area * ratio)
        fit = min(1.0, height / cut_height, width / cut_width)
        rows = min(max(round(fit * cut_height), 1), height)
        columns = min(max(round(fit * cut_width), 1), width)
        top = int(row[_TOP] * (height - rows + 1))
        left = int(row[_LEFT] * (width - columns + 1))
        return top, left, rows, columns

    def _recolour(self, images: Tensor, draws: Tensor) -> Tensor:
        out = torch.empty_like(images)
        size = max(_CHUNK // max(images.shape[1:].numel(), 1), 1)
        for start in range(0, len(images), size):
            some = slice(start, start + size)
            # round() takes halves to the even neighbour.
            out[some] = self._jitter(images[some].float(), draws[some]).round_()
        return out

    def _jitter(self, rgb: Tensor, draws: Tensor) -> Tensor:
        """Change colours, from 0 to 255, in place.

        Each step is one addition, multiplication or division of single pixels, whose result IEEE
        754 defines, or a sum of whole numbers: the bits depend on no shape, thread or processor.
        """
        if self.brightness:
            rgb.mul_(_factor(self.brightness, draws[:, _BRIGHTNESS])).clamp_(0, 255)
        if self.contrast:
            # In whole 1/256 of a level, whose sum is the same whatever is added first.
            levels = _grey(rgb).mul_(256).round_()
            total = levels.sum((1, 2, 3), keepdim=True, dtype=torch.float64)
            mean = (total / (256 * rgb[0, 0].numel())).float()
            _blend(rgb, mean, _factor(self.contrast, draws[:, _CONTRAST]))
        if self.saturation:
            _blend(rgb, _grey(rgb), _factor(self.saturation, draws[:, _SATURATION]))
        if self.hue:
            turn = (2 * draws[:, _HUE] - 1) * self.hue
            rgb = _turn_hue(rgb, turn.view(-1, 1, 1, 1))
        return rgb


def _factor(strength: float, draws: Tensor) -> Tensor:
    """Uniform in [1 - strength, 1 + strength], from 0 on; (n, 1, 1, 1)."""
    low = max(1 - strength, 0.0)
    return (draws * (1 + strength - low) + low).view(-1, 1, 1, 1)


def _blend(rgb: Tensor, other: Tensor, factor: Tensor) -> None:
    """``factor`` of the one and the rest of the other, in place."""
    rgb.mul_(factor).add_(other * (1 - factor)).clamp_(0, 255)


def _grey(rgb: Tensor) -> Tensor:
    """The grey picture, (n, 1, H, W); weights of ITU-R 601-2."""
    red, green, blue = _channels(rgb)
    return (red * 0.299).add_(green * 0.587).add_(blue * 0.114)


def _channels(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Red, green and blue, (n, 1, H, W) each."""
    return rgb[:, 0:1], rgb[:, 1:2], rgb[:, 2:3]


def _turn_hue(rgb: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of the HSV colour space; saturation and value stay.

    Args:
        rgb: (n, 3, H, W).
        turn: (n, 1, 1, 1), in whole turns.
    """
    high = rgb.amax(1, keepdim=True)
    chroma = high - rgb.amin(1, keepdim=True)
    # Grey has no hue; any will do, for it is multiplied by no chroma.
    unit = torch.where(chroma > 0, chroma, 1)
    red, green, blue = _channels(rgb)
    # Hue in sixths of a turn: 0 red, 2 green, 4 blue.
    hue = torch.where(high == green, 2 + (blue - red) / unit, 4 + (red - green) / unit)
    hue = torch.where(high == red, (green - blue) / unit, hue) + 6 * turn
    turned = []
    for start in (5, 3, 1):  # for red, green and blue
        at = hue + start
        at = at - 6 * (at / 6).floor()
        turned.append(high - chroma * torch.minimum(at, 4 - at).clamp_(0, 1))
    return torch.cat(turned, dim=1).clamp_(0, 255)


def _number(name: str, value: float, most: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 <= number <= most and math.isfinite(number)):
        allowed = "at least 0" if most == math.inf else f"between 0 and {most}"
        raise FedloraError(f"data.augment.{name} must be {allowed}, got {value!r}.")
    return number


def _range(name: str, value: tuple[float, float], most: float) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (0 < low <= high <= most and math.isfinite(high)):
        end = "" if most == math.inf else f", not more than {most}"
        raise FedloraError(
            f"data.augment.{name} must be two positive numbers, the smaller one first{end}, got "
            f"{value!r}."
        )
    return low, high
