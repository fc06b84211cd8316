"""From a picture to what the image tower takes: one resize on the CPU, one scaling per step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

# PIL's codes, as transformers writes them into preprocessor_config.json.
_RESAMPLE: dict[Any, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
_REQUIRED = ("size", "image_mean", "image_std", "resample")
# How often the long edge may hold the short one where the centre is cut out: all of the picture is
# resized first, which takes gigabytes for a line of pixels.
_LONGEST = 100


@dataclass(frozen=True)
class ImagePreprocess:
    """How a model wants its pictures.

    Attributes:
        size: height and width of the model's input, in pixels.
        crop: True: resize the shortest edge to ``size`` and cut out the centre (CLIP);
            False: resize to a square, whatever the shape (SigLIP).
        mean: per channel, subtracted after scaling to [0, 1].
        std: per channel, divided by after that.
        resample: the filter.
    """

    size: int
    crop: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        """Check the values, and turn lists (JSON knows no tuples) into tuples."""
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                "mean and std must be three numbers each, those of std positive, got "
                f"mean={self.mean} and std={self.std}."
            )
        if self.resample not in _RESAMPLE.values():
            raise ValueError(f'resample must be "bicubic" or "bilinear", got {self.resample!r}.')

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImagePreprocess:
        """Read a ``preprocessor_config.json`` of transformers.

        Args:
            config: the parsed JSON. ``size`` and ``crop_size`` are a number or a dict.

        Raises:
            ValueError: if a field is missing or is something that this class cannot do.
        """
        missing = [name for name in _REQUIRED if config.get(name) is None]
        if missing:
            raise ValueError(
                f"The image processor config lacks {', '.join(missing)}. Take the "
                "preprocessor_config.json that belongs to the model."
            )
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not config.get(name, True):
                raise ValueError(f"{name} must be true in the image processor config, got false.")
        if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError(f"rescale_factor must be 1/255, got {config['rescale_factor']}.")
        if config["resample"] not in _RESAMPLE:
            raise ValueError(
                f"resample must be 2 (bilinear) or 3 (bicubic), got {config['resample']!r}."
            )
        size, crop = _geometry(config)
        mean, std = config["image_mean"], config["image_std"]
        return cls(size, crop, mean, std, _RESAMPLE[config["resample"]])

    def refuses(self, height: int, width: int) -> str | None:
        """What is wrong with pictures of this size in pixels; None: :meth:`resize` takes them."""
        if self.crop and max(height, width) > _LONGEST * min(height, width):
            return f"{width} x {height} pixels, more than {_LONGEST} times as long as wide"
        return None

    def resize(self, images: Tensor) -> Tensor:
        """Bring pictures to the model's size; within 2/255 of what PIL makes of them, width first.

        Args:
            images: (n, C, H, W) or (C, H, W), uint8, on the CPU; C is 1 (grey) or 3 (RGB).

        Returns:
            (n, 3, size, size) or (3, size, size), uint8.

        Raises:
            ValueError: if ``images`` is of another type or shape, or far too long to cut out the
                centre.
        """
        if (
            images.dtype != torch.uint8
            or images.ndim not in (3, 4)
            or images.shape[-3] not in (1, 3)
        ):
            raise ValueError(
                "images must be uint8 of shape (n, C, H, W) or (C, H, W) with 1 or 3 channels, got "
                f"{images.dtype} of shape {tuple(images.shape)}. Convert them to RGB first."
            )
        refusal = self.refuses(*images.shape[-2:])
        if refusal is not None:
            raise ValueError(f"images must not be {refusal}. Cut them first.")
        batch = images.reshape(-1, *images.shape[-3:])
        height, width = self._resized(*batch.shape[-2:])
        if batch.shape[-2:] != (height, width):
            # As uint8: on floats the result overshoots and is up to 21/255 away from PIL's.
            batch = interpolate(batch, (height, width), mode=self.resample, antialias=True)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        batch = batch[..., top : top + self.size, left : left + self.size]
        batch = batch.expand(-1, 3, -1, -1).contiguous()
        return batch if images.ndim == 4 else batch[0]

    def normalise(self, images: Tensor) -> Tensor:
        """Scale pixels as the model was trained: ``(images / 255 - mean) / std``.

        Args:
            images: (..., 3, H, W), uint8, on any device.

        Returns:
            The same shape, float32, on the same device.
        """
        if images.device not in self._affine:
            # Kept per device: sending six numbers to a GPU in every step would stall it.
            mean, std = torch.tensor([self.mean, self.std], dtype=torch.float64).view(2, 3, 1, 1)
            scale, shift = (1 / (255 * std)).float(), (-mean / std).float()
            self._affine[images.device] = scale.to(images.device), shift.to(images.device)
        scale, shift = self._affine[images.device]
        return images.to(torch.float32, copy=True).mul_(scale).add_(shift)

    @cached_property
    def _affine(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not self.crop:
            return self.size, self.size
        short = min(height, width)
        # Rounded down, as transformers does.
        return self.size * height // short, self.size * width // short


def _geometry(config: Mapping[str, Any]) -> tuple[int, bool]:
    """The square size, and whether it is cut out of a picture of which only one edge was set."""
    size, crop_size = config["size"], config.get("crop_size")
    crop = bool(config.get("do_center_crop", False))
    edges = _edges(size)
    # A bare number is the shortest edge to a processor that crops, a square to one that does not.
    one_edge = "shortest_edge" in size if isinstance(size, Mapping) else crop
    if len(edges) != 1 or (crop and _edges(crop_size) != edges) or (one_edge and not crop):
        raise ValueError(
            "The image processor config must lead to one square size (crop_size equal to size, or "
            f"height equal to width), got size={size!r}, crop_size={crop_size!r}, "
            f"do_center_crop={crop}."
        )
    return edges.pop(), one_edge


def _edges(size: Any) -> set[int]:
    """The distinct edge lengths that a ``size`` or ``crop_size`` names (none: it is unusable)."""
    if isinstance(size, int):
        return {size}
    named = {key: value for key, value in (size or {}).items() if value is not None}
    return set(named.values()) if set(named) in ({"shortest_edge"}, {"height", "width"}) else set()
