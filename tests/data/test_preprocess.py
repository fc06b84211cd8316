from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fedlora.data.preprocess import ImagePreprocess

CLIP = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
SIGLIP = {
    "size": {"height": 256, "width": 256},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
}


def make(size=32, crop=True, resample="bicubic"):
    return ImagePreprocess(size, crop, (0.0, 0.5, 0.25), (1.0, 0.5, 0.25), resample)


def picture(height, width, channels):
    """Noise over a gradient: hard edges, where filters differ most, and smooth parts."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, channels))
    ramp = np.linspace(0, 255, width)[None, :, None]
    return ((noise + ramp) / 2).astype(np.uint8)


def by_pil(pixels, size, crop, resample):
    """The same by PIL: shortest edge, rounded down, then the centre."""
    height, width, channels = pixels.shape
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels).convert("RGB")
    filter_ = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[resample]
    if not crop:
        return np.asarray(image.resize((size, size), filter_))
    if width <= height:
        new = size, int(size * height / width)
    else:
        new = int(size * width / height), size
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(image.resize(new, filter_).crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((8, 8), 32), ((100, 70), 32), ((97, 145), 64), ((30, 45), 224), ((32, 32), 32)],
)
def test_resize_agrees_with_pil(shape, size, crop, resample, channels):
    pixels = picture(*shape, channels)
    ours = make(size, crop, resample).resize(torch.from_numpy(pixels).permute(2, 0, 1))
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    theirs = by_pil(pixels, size, crop, resample).astype(int)
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 2


def test_resize_of_a_batch_is_that_of_each_picture():
    batch = torch.stack(
        [torch.from_numpy(picture(20, 30, 3)).permute(2, 0, 1).flip(i) for i in (0, 1, 2)]
    )
    pre = make(16)
    assert torch.equal(pre.resize(batch), torch.stack([pre.resize(image) for image in batch]))


def test_grey_becomes_three_equal_channels():
    out = make(16).resize(torch.from_numpy(picture(8, 8, 1)).permute(2, 0, 1)[None])
    assert out.shape == (1, 3, 16, 16)
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(4, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
    ],
)
def test_resize_refuses_what_is_no_picture(bad):
    with pytest.raises(ValueError, match="images must be uint8 of shape"):
        make().resize(bad)


def test_normalise_by_hand():
    # mean (0, .5, .25), std (1, .5, .25): 255 -> 1, 1, 3; 0 -> 0, -1, -1; 51 (0.2) -> .2, -.6, -.2
    images = torch.tensor([255, 0, 51], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    before = images.clone()
    out = make().normalise(images)
    expected = torch.tensor([[1.0, 1.0, 3.0], [0.0, -1.0, -1.0], [0.2, -0.6, -0.2]])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected[..., None, None].expand(3, 3, 2, 2))
    assert torch.equal(images, before)


def test_normalise_agrees_with_the_formula_for_every_pixel_value():
    pre = ImagePreprocess.from_config(CLIP)
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (
        torch.tensor(CLIP[key]).double().view(3, 1, 1) for key in ("image_mean", "image_std")
    )
    torch.testing.assert_close(
        pre.normalise(values).double(), (values.double() / 255 - mean) / std, atol=1e-6, rtol=0
    )


def test_normalise_leaves_floats_alone_and_works_in_training_after_inference():
    pre = make()
    with torch.inference_mode():
        pre.normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    images = torch.full((1, 3, 2, 2), 51.0)
    weight = torch.ones(1, requires_grad=True)
    (pre.normalise(images) * weight).sum().backward()
    assert images.eq(51).all()
    assert weight.grad is not None


def test_plain_data_after_use():
    pre = make()
    pre.normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert pre == make()
    assert hash(pre) == hash(make())
    assert copy.deepcopy(pre) == pre
    saved = json.loads(json.dumps(dataclasses.asdict(pre)))
    assert sorted(saved) == ["crop", "mean", "resample", "size", "std"]
    assert ImagePreprocess(**saved) == pre


@pytest.mark.parametrize(
    ("change", "size", "crop"),
    [
        ({}, 224, True),
        ({"size": 224, "crop_size": 224}, 224, True),
        ({"size": {"height": 224, "width": 224}}, 224, False),
        ({"size": 224, "do_center_crop": False}, 224, False),
        (
            {
                "size": {"shortest_edge": 32, "height": None},
                "crop_size": {"height": 32, "width": 32},
            },
            32,
            True,
        ),
    ],
)
def test_from_config_of_clip(change, size, crop):
    pre = ImagePreprocess.from_config({**CLIP, **change})
    assert (pre.size, pre.crop, pre.resample) == (size, crop, "bicubic")
    assert pre.mean == (0.48145466, 0.4578275, 0.40821073)
    assert pre.std == (0.26862954, 0.26130258, 0.27577711)


def test_from_config_of_siglip():
    assert ImagePreprocess.from_config(SIGLIP) == ImagePreprocess(
        256, False, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": None, "resample": None}, "lacks image_mean, resample"),
        ({"size": None}, "lacks size"),
        ({"size": {"height": 224, "width": 192}}, "one square size.*'width': 192"),
        ({"size": {"height": 224}}, "one square size"),
        ({"size": {"shortest_edge": 256}}, "one square size.*256"),
        ({"do_center_crop": False}, "one square size.*do_center_crop=False"),
        ({"crop_size": None}, "one square size.*crop_size=None"),
        ({"crop_size": {"height": 224, "width": 100}}, "one square size"),
        ({"resample": 1}, "resample must be 2 .* got 1"),
        ({"do_normalize": False}, "do_normalize must be true"),
        ({"rescale_factor": 1.0}, "rescale_factor must be 1/255, got 1.0"),
        ({"image_std": [1.0, 0.0, 1.0]}, "those of std positive"),
        ({"image_mean": [0.5]}, "three numbers each"),
        ({"size": 0, "crop_size": 0}, "size must be at least 1"),
    ],
)
def test_from_config_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        ImagePreprocess.from_config({**CLIP, **change})


def test_unknown_filter():
    with pytest.raises(ValueError, match='"bicubic" or "bilinear", got \'nearest\''):
        make(resample="nearest")
