from __future__ import annotations

import colorsys
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image, ImageEnhance

from fedlora.data import augment
from fedlora.data.augment import NUM_DRAWS, Augmentation
from fedlora.errors import FedloraError

FLIP, AREA, RATIO, TOP, LEFT, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(9)
OFF = {"flip": 0.0, "crop_scale": None}
ALL = {
    "crop_scale": (0.2, 1.0),
    "brightness": 0.4,
    "contrast": 0.5,
    "saturation": 1.5,
    "hue": 0.2,
}

some = settings(max_examples=40, deadline=None)
strengths = st.one_of(st.just(0.0), st.floats(0, 3))
scales = st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted).map(tuple)
augmentations = st.builds(
    Augmentation,
    flip=st.floats(0, 1),
    crop_scale=st.none() | scales,
    crop_ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted).map(tuple),
    brightness=strengths,
    contrast=strengths,
    saturation=strengths,
    hue=st.floats(0, 0.5),
)
seeds = st.integers(0, 2**63 - 1)
sizes = st.integers(1, 20)


def noise(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator).to(torch.uint8)


def draws(count=1, **columns):
    """Draws of one half, but for some columns."""
    made = torch.full((count, NUM_DRAWS), 0.5)
    for name, value in columns.items():
        made[:, globals()[name]] = torch.as_tensor(value)
    return made


def row(*pixels):
    """One picture of one row, out of grey levels or (red, green, blue)."""
    colours = [(p, p, p) if isinstance(p, int) else p for p in pixels]
    return torch.tensor(colours, dtype=torch.uint8).T.reshape(1, 3, 1, len(pixels))


def pixels(images):
    """What ``row`` was given, as three lists."""
    return images[0, :, 0].tolist()


def coordinates(count, height, width):
    """Pictures in which red is the column and green is the row."""
    images = torch.zeros(count, 3, height, width, dtype=torch.uint8)
    images[:, 0] = torch.arange(width)
    images[:, 1] = torch.arange(height)[:, None]
    return images


def boxes(augmentation, rows, height=200, width=200):
    """Top, left, height and width of each box: corners keep their values when enlarged."""
    out = augmentation.augment(coordinates(len(rows), height, width), rows).long()
    (left, top), (right, bottom) = out[:, :2, 0, 0].T, out[:, :2, -1, -1].T
    return top, left, bottom - top + 1, right - left + 1


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def assert_near(ours, theirs):
    assert (ours.int() - theirs.int()).abs().max() <= 1


@some
@given(augmentations, st.integers(0, 5), sizes, sizes, seeds)
def test_any_pictures_stay_pictures(augmentation, count, height, width, seed):
    images = noise(count, height, width)
    before = images.clone()
    out = augmentation.augment(images, augmentation.draw(count, seed))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    assert torch.equal(images, before)


@some
@given(augmentations, sizes, sizes, seeds, st.sampled_from([1, 300, 2**18]))
def test_a_picture_does_not_depend_on_its_neighbours(augmentation, height, width, seed, chunk):
    images, rows = noise(7, height, width), augmentation.draw(7, seed)
    together = augmentation.augment(images, rows)
    order = torch.tensor([4, 0, 6, 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "_CHUNK", chunk)
        alone = [augmentation.augment(images[i : i + 1], rows[i : i + 1]) for i in range(7)]
        others = augmentation.augment(images[order], rows[order])
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[order], others)


@pytest.mark.parametrize("size", [32, 224])
def test_threads_do_not_change_a_bit(size):
    images, augmentation = noise(6, size, size), Augmentation(**ALL)
    rows = augmentation.draw(6, 1)
    one = augmentation.augment(images, rows)
    torch.set_num_threads(2)
    try:
        assert torch.equal(augmentation.draw(6, 1), rows)
        assert torch.equal(augmentation.augment(images, rows), one)
    finally:
        torch.set_num_threads(1)


def test_the_same_seed_draws_the_same_and_touches_no_other_generator():
    augmentation = Augmentation()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    rows = augmentation.draw(50, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(augmentation.draw(50, 3), rows)
    assert not torch.equal(augmentation.draw(50, 4), rows)


def test_draws_are_uniform_and_not_alike():
    rows = Augmentation().draw(20_000, 0)
    assert rows.shape == (20_000, NUM_DRAWS)
    assert rows.dtype == torch.float32
    assert 0 <= rows.min() < 1e-3
    assert 1 - 1e-3 < rows.max() < 1
    # Of 20,000 numbers the mean is off by 0.002, the correlation by 0.007, as a rule.
    assert (rows.mean(0) - 0.5).abs().max() < 0.01
    assert (rows.var(0) - 1 / 12).abs().max() < 0.003
    assert (torch.corrcoef(rows.T) - torch.eye(NUM_DRAWS)).abs().max() < 0.04


def test_nothing_on_gives_the_pictures_themselves():
    images = noise(3, 5, 5)
    augmentation = Augmentation(**OFF)
    assert augmentation.augment(images, augmentation.draw(3, 0)) is images


@some
@given(sizes, sizes, seeds)
def test_a_flip_is_a_flip_and_its_own_inverse(height, width, seed):
    images, augmentation = noise(4, height, width), Augmentation(flip=1, crop_scale=None)
    rows = augmentation.draw(4, seed)
    once = augmentation.augment(images, rows)
    assert torch.equal(once, torch.flip(images, [-1]))
    assert torch.equal(augmentation.augment(once, rows), images)


@pytest.mark.parametrize("other", [{"crop_scale": None}, {"hue": 0.1, "crop_scale": (1.0, 1.0)}])
def test_which_pictures_are_flipped_depends_on_flip_alone(other):
    images = row(0, 100).expand(1000, -1, 2, -1)
    augmentation = Augmentation(flip=0.3, **other)
    rows = augmentation.draw(1000, 0)
    flipped = augmentation.augment(images, rows)[:, 0, 0, 0] == 100
    assert torch.equal(flipped, rows[:, FLIP] < 0.3)
    assert 250 < flipped.sum() < 350


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (33, 33), (20, 24)])
def test_the_whole_picture_stays_as_it_is(shape):
    images = noise(5, *shape)
    augmentation = Augmentation(flip=0, crop_scale=(1.0, 1.0))
    assert torch.equal(augmentation.augment(images, augmentation.draw(5, 0)), images)
    assert torch.equal(augmentation.augment(images, torch.zeros(5, NUM_DRAWS)), images)


@pytest.mark.parametrize(("top", "left"), [(0.0, 0.0), (0.5, 0.25), (0.9999, 0.9999)])
def test_a_crop_is_that_of_pil(top, left):
    # A quarter of 32 x 32 as a square: 16 x 16, which starts at one of 17 rows.
    images = noise(1, 32, 32)
    augmentation = Augmentation(flip=0, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    ours = augmentation.augment(images, draws(TOP=top, LEFT=left))
    x, y = int(left * 17), int(top * 17)
    box = pil(images[0]).crop((x, y, x + 16, y + 16))
    assert_near(ours[0], from_pil(box.resize((32, 32), Image.Resampling.BILINEAR)))


def test_a_crop_of_a_gradient_is_a_gradient():
    images = coordinates(1, 32, 32)
    images[:, 0] *= 3
    augmentation = Augmentation(flip=0, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    ours = augmentation.augment(images, draws(TOP=0.5, LEFT=0.25))
    # Half-pixel centres: pixel j of 32 lies at (j + 0.5) / 2 - 0.5 of 16, beyond the ends at them.
    at = ((torch.arange(32) + 0.5) / 2 - 0.5).clamp(0, 15)
    assert (ours[0, 0] - 3 * (at + 4)).abs().max() <= 1
    assert (ours[0, 1] - (at + 8)[:, None]).abs().max() <= 1
    assert (ours[0, 2] == 0).all()


@some
@given(scales, sizes, sizes, st.integers(0, 255), st.integers(0, 255), seeds)
def test_a_crop_adds_no_new_extremes(scale, height, width, one, other, seed):
    low, high = sorted((one, other))
    images = noise(4, height, width, seed).clamp(low, high)
    augmentation = Augmentation(crop_scale=scale)
    out = augmentation.augment(images, augmentation.draw(4, seed))
    assert low <= out.min() <= out.max() <= high


@some
@given(scales, st.floats(0.3, 1), st.floats(1, 3), st.integers(50, 250), seeds)
def test_boxes_keep_area_and_ratio(scale, least, most, width, seed):
    augmentation = Augmentation(flip=0, crop_scale=scale, crop_ratio=(least, most))
    height = 200
    rows = augmentation.draw(20, seed)
    top, left, rows_cut, columns = (
        edge.double() for edge in boxes(augmentation, rows, height, width)
    )
    assert (top + rows_cut).max() <= height
    assert (left + columns).max() <= width
    # Edges are rounded to whole pixels: off by one half each.
    slack = (rows_cut + columns) / 2 + 0.25
    area = rows_cut * columns
    if least <= width / height <= most:
        assert (area >= scale[0] * height * width - slack).all()
    assert (area <= scale[1] * height * width + slack).all()
    assert ((columns + 0.5) / (rows_cut - 0.5) >= least).all()
    assert ((columns - 0.5) / (rows_cut + 0.5) <= most).all()


def test_boxes_are_spread_as_torchvision_says():
    # Small enough that any ratio fits, so that torchvision draws each box once.
    augmentation = Augmentation(flip=0, crop_scale=(0.2, 0.6), crop_ratio=(0.75, 4 / 3))
    rows = augmentation.draw(4000, 0)
    top, left, height, width = (edge.double() for edge in boxes(augmentation, rows, 80, 80))
    area, ratio = height * width / 80**2, (width / height).log() / math.log(4 / 3)
    # Uniform on [a, b]: mean (a + b) / 2, variance (b - a)^2 / 12.
    assert abs(area.mean() - 0.4) < 0.01
    assert abs(area.var() - 0.4**2 / 12) < 0.001
    assert abs(ratio.mean()) < 0.05
    assert abs(ratio.var() - 2**2 / 12) < 0.02
    for start, free in ((top, 80 - height), (left, 80 - width)):
        assert abs((start / free).mean() - 0.5) < 0.02
        assert (start == 0).any()
        assert (start == free).any()


@pytest.mark.parametrize(("shape", "expected"), [((100, 100), (50, 100)), ((200, 50), (25, 50))])
def test_a_box_that_cannot_fit_shrinks(shape, expected):
    # Twice as wide as high: at most W x W / 2, whatever the area that was asked for.
    augmentation = Augmentation(flip=0, crop_scale=(0.9, 1.0), crop_ratio=(2.0, 2.0))
    _, left, height, width = boxes(augmentation, draws(), *shape)
    assert (height.item(), width.item()) == expected
    assert left.item() == 0


def test_ratios_are_those_that_fit():
    # 0.81 of a square: ratios from 0.81 to 1 / 0.81 fit, the ends of which touch the edges.
    augmentation = Augmentation(flip=0, crop_scale=(0.81, 0.81), crop_ratio=(0.5, 2.0))
    rows = draws(3, RATIO=torch.tensor([0.0, 0.5, 1 - 2**-24]))
    _, _, height, width = boxes(augmentation, rows)
    assert height.tolist() == [200, 180, 162]
    assert width.tolist() == [162, 180, 200]


@pytest.mark.parametrize(
    ("brightness", "draw", "expected"),
    [
        (0.4, 0.75, [0, 12, 120, 255]),  # 0.6 + 0.75 * 0.8 = 1.2
        (0.4, 0.0, [0, 6, 60, 150]),
        (3.0, 0.0, [0, 0, 0, 0]),  # from 0 to 4
        (3.0, 0.5, [0, 20, 200, 255]),
    ],
)
def test_brightness_multiplies(brightness, draw, expected):
    augmentation = Augmentation(**OFF, brightness=brightness)
    out = augmentation.augment(row(0, 10, 100, 250), draws(BRIGHTNESS=draw))
    assert pixels(out) == [expected] * 3


def test_halves_go_to_the_even_neighbour():
    out = Augmentation(**OFF, brightness=1).augment(row(1, 3, 5, 7), draws(BRIGHTNESS=0.75))
    assert pixels(out)[0] == [2, 4, 8, 10]  # 1.5, 4.5, 7.5, 10.5


def test_contrast_is_about_the_mean_of_the_grey_picture():
    augmentation = Augmentation(**OFF, contrast=1)
    assert pixels(augmentation.augment(row(50, 150), draws(CONTRAST=0.25)))[0] == [75, 125]
    assert pixels(augmentation.augment(row(50, 250), draws(CONTRAST=0.75)))[0] == [0, 255]
    # Red is 76.245 in grey, black is 0: the mean is 38.12.
    out = augmentation.augment(row((255, 0, 0), 0), draws(CONTRAST=0.0))
    assert pixels(out) == [[38, 38]] * 3


def test_saturation_is_about_the_grey_picture():
    augmentation = Augmentation(**OFF, saturation=1)
    colours = row((255, 0, 0), (0, 255, 0), (0, 0, 255), 77)
    # 255 times 0.299, 0.587 and 0.114
    grey = augmentation.augment(colours, draws(SATURATION=0.0))
    assert pixels(grey) == [[76, 150, 29, 77]] * 3
    # Half of the colour and half of its grey
    half = augmentation.augment(colours, draws(SATURATION=0.25))
    assert pixels(half) == [[166, 75, 15, 77], [38, 202, 15, 77], [38, 75, 142, 77]]


def test_colours_change_in_order_and_are_clipped_between():
    # Twice as bright: 200, 400 -> 255; no contrast: 227.5; the other way round it would be 255.
    augmentation = Augmentation(**OFF, brightness=1, contrast=1)
    out = augmentation.augment(row(100, 200), draws(BRIGHTNESS=1.0, CONTRAST=0.0))
    assert pixels(out)[0] == [228, 228]


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_colours_agree_with_pil(name, enhance, draw):
    image = noise(1, 40, 30) // 2 + 60
    rows = draws(**{name.upper(): draw})
    ours = Augmentation(**OFF, **{name: 0.8}).augment(image, rows)
    assert_near(ours[0], from_pil(enhance(pil(image[0])).enhance(0.2 + 1.6 * draw)))


@some
@given(st.floats(0, 1), st.sampled_from([0.1, 0.5]))
def test_hue_agrees_with_colorsys(draw, hue):
    draw = torch.tensor(draw).item()
    colours = list(itertools.product((0, 1, 60, 150, 254, 255), repeat=3))
    out = Augmentation(**OFF, hue=hue).augment(row(*colours), draws(HUE=draw))
    for (red, green, blue), ours in zip(colours, zip(*pixels(out), strict=True), strict=True):
        at, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
        theirs = colorsys.hsv_to_rgb((at + (2 * draw - 1) * hue) % 1, saturation, value)
        # Half a level, and what float32 makes of it.
        assert max(abs(a - 255 * b) for a, b in zip(ours, theirs, strict=True)) < 0.501


def test_hue_turns():
    augmentation = Augmentation(**OFF, hue=0.5)
    colours = row((255, 0, 0), (0, 255, 0), (0, 0, 255), 77, (200, 100, 100))
    turned = augmentation.augment(colours, draws(HUE=0.0))
    assert pixels(turned) == [
        [0, 255, 255, 77, 100],
        [255, 0, 255, 77, 200],
        [255, 255, 0, 77, 200],
    ]
    # A third of a turn: red becomes green.
    turned = augmentation.augment(colours, draws(HUE=5 / 6))
    assert pixels(turned) == [[0, 0, 255, 77, 100], [255, 0, 0, 77, 200], [0, 255, 0, 77, 100]]
    assert torch.equal(augmentation.augment(colours, draws(HUE=0.5)), colours)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("flip", -0.1, "between 0 and 1"),
        ("flip", 1.1, "between 0 and 1"),
        ("flip", math.nan, "between 0 and 1"),
        ("hue", 0.6, r"between 0 and 0\.5"),
        ("brightness", -0.1, "at least 0"),
        ("contrast", math.inf, "at least 0"),
        ("saturation", "much", "at least 0"),
        ("crop_scale", (0.0, 1.0), "two positive numbers, the smaller one first, not more than 1"),
        ("crop_scale", (0.5, 1.1), "not more than 1"),
        ("crop_scale", (0.9, 0.5), "the smaller one first"),
        ("crop_scale", 0.5, "two positive numbers"),
        ("crop_scale", (0.1, 0.2, 0.3), "two positive numbers"),
        ("crop_ratio", (-1.0, 1.0), "two positive numbers, the smaller one first, got"),
        ("crop_ratio", (1.0, math.inf), "two positive numbers"),
        ("crop_ratio", (math.nan, 1.0), "two positive numbers"),
    ],
)
def test_a_wrong_setting_is_named(name, value, allowed):
    with pytest.raises(FedloraError, match=rf"^data\.augment\.{name} must be .*{allowed}") as error:
        Augmentation(**{name: value})
    assert str(error.value).endswith(f"got {value!r}.")
    assert "\n" not in str(error.value)


def test_pictures_and_draws_must_belong_together():
    augmentation, images = Augmentation(), noise(3, 4, 4)
    rows = augmentation.draw(3, 0)
    for wrong in (images.float(), images[0], images[:, :1]):
        with pytest.raises(ValueError, match=r"images must be uint8 of shape \(n, 3, H, W\), got"):
            augmentation.augment(wrong, rows)
    for wrong in (rows[:2], rows[:, :5], rows[0]):
        with pytest.raises(ValueError, match=r"draws must be one row of 9 per picture, \(3, 9\)"):
            augmentation.augment(images, wrong)


class Upright(Augmentation):
    """A user's own."""

    def __init__(self, zoom: float = 0.5) -> None:
        super().__init__(flip=0, crop_scale=(zoom, 1.0))


@dataclass
class Data:
    """What a config builds."""

    augment: Augmentation | None = None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--data.augment=fedlora.data.augment.Augmentation"], {"flip": 0.5}),
        (
            ["--data.augment=Augmentation", "--data.augment.crop_scale=[0.2,0.8]"],
            {"crop_scale": (0.2, 0.8)},
        ),
        (
            ["--data.augment=Augmentation", "--data.augment.crop_scale=null"],
            {"flip": 0.5, "crop_scale": None},
        ),
        (
            [f"--data.augment={__name__}.Upright", "--data.augment.zoom=0.1"],
            {"flip": 0, "crop_scale": (0.1, 1)},
        ),
    ],
)
def test_a_config_builds_it(arguments, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Data, "data")
    config = parser.parse_args(arguments)
    for again in (config, parser.parse_string(parser.dump(config, skip_unset=False))):
        made = parser.instantiate(again).data.augment
        if expected is None:
            assert made is None
        else:
            assert isinstance(made, Augmentation)
            assert {name: getattr(made, name) for name in expected} == expected
