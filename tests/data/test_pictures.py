from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedlora.data.pictures import to_labels, to_pixels
from fedlora.data.preprocess import ImagePreprocess
from fedlora.errors import FedloraError

SIZE = 32
PRE = ImagePreprocess(SIZE, True, (0.0, 0.5, 0.25), (1.0, 0.5, 0.25))
SQUARE = ImagePreprocess(SIZE, False, (0.5,) * 3, (0.5,) * 3, "bilinear")


def picture(height=40, width=50, channels=3, seed=0):
    """(H, W, C), uint8: noise over a ramp, hard edges and smooth parts."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, channels))
    return ((noise + np.linspace(0, 255, width)[None, :, None]) / 2).astype(np.uint8)


def tensor(pixels):
    """(H, W, C) array -> (C, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def by_transformers(image, pre=PRE):
    """(3, size, size) uint8 as the CLIP processor's PIL path makes it."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"shortest_edge": pre.size} if pre.crop else {"height": pre.size, "width": pre.size}
    processor = CLIPImageProcessorPil(
        size=size,
        crop_size={"height": pre.size, "width": pre.size},
        do_center_crop=pre.crop,
        resample=3 if pre.resample == "bicubic" else 2,
        do_rescale=False,
        do_normalize=False,
    )
    return torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))


def by_pil(image, pre=PRE):
    """The same by PIL itself, width first.

    In one call Pillow 13 takes the height first for some tall pictures. Bicubic overshoots are
    cut off between the passes, so that the order shows: up to 30/255 on noise of black and white.
    """
    filter_ = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    short = min(image.size)
    new = tuple(pre.size * edge // short if pre.crop else pre.size for edge in image.size)
    left, top = ((edge - pre.size) // 2 for edge in new)
    half = image.convert("RGB").resize((new[0], image.height), filter_[pre.resample])
    whole = half.resize(new, filter_[pre.resample])
    pixels = np.array(whole.crop((left, top, left + pre.size, top + pre.size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def close(ours, theirs):
    return ours.int().sub(theirs.int()).abs().max() <= 2


def rgb_forms(pixels):
    """Every form of one RGB picture."""
    flipped = np.ascontiguousarray(pixels[..., ::-1])
    first = pixels.transpose(2, 0, 1)
    read_only = pixels.copy()
    read_only.flags.writeable = False
    return {
        "tensor": tensor(pixels),
        "tensor batch": tensor(pixels)[None],
        "tensor, channels last in memory": torch.from_numpy(pixels).permute(2, 0, 1),
        "array": pixels,
        "array batch": pixels[None],
        "array, flipped view": flipped[..., ::-1],
        "array, read-only": read_only,
        "array, channels first": first[None],
        "pil": Image.fromarray(pixels),
        "pil, opaque": Image.fromarray(pixels).convert("RGBA"),
        "list of tensors": [tensor(pixels)],
        "list of arrays": [pixels],
        "tuple of pil": (Image.fromarray(pixels),),
        "list of batches": [pixels[None]],
    }


def grey_forms(pixels):
    """Every form of one grey picture (H, W)."""
    return {
        "tensor": torch.from_numpy(pixels)[None],
        "tensor batch": torch.from_numpy(pixels)[None, None],
        "tensor, three channels": torch.from_numpy(pixels).expand(3, -1, -1),
        "tensor, channels last in memory": torch.from_numpy(pixels)[..., None].permute(2, 0, 1),
        "array": pixels,
        "array, batch or channel": pixels[None],
        "array, channel last": pixels[..., None],
        "array, channels first": pixels[None, None],
        "array, channels last": pixels[None, ..., None],
        "array, three channels": np.repeat(pixels[..., None], 3, -1),
        "pil": Image.fromarray(pixels),
        "pil, opaque": Image.fromarray(pixels).convert("LA"),
        "pil, rgb": Image.fromarray(pixels).convert("RGB"),
        "list": [pixels],
    }


# From 5 upwards: 1 and 3 as a height or width leave the shape of an array in doubt, 4 too.
edges = st.integers(5, 90)


@settings(max_examples=25, deadline=None)
@given(height=edges, width=edges, seed=st.integers(0, 99), pre=st.sampled_from([PRE, SQUARE]))
def test_every_form_gives_the_same_bits_and_those_of_pil(height, width, seed, pre):
    pixels = picture(height, width, 3, seed)
    grey = np.ascontiguousarray(picture(height, width, 1, seed)[..., 0])
    for forms, source in ((rgb_forms(pixels), pixels), (grey_forms(grey), grey)):
        reference = to_pixels(Image.fromarray(source), pre)
        assert reference.shape == (1, 3, pre.size, pre.size)
        assert reference.dtype == torch.uint8
        assert close(reference[0], by_pil(Image.fromarray(source), pre))
        for name, form in forms.items():
            ours = to_pixels(form, pre)
            assert torch.equal(ours, reference), name
            assert ours.is_contiguous(), name


@pytest.mark.parametrize("pre", [PRE, SQUARE])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (50, 35), (100, 70), (30, 90)])
def test_agrees_with_the_processor_of_transformers(height, width, channels, pre):
    image = Image.fromarray(picture(height, width, channels).squeeze())
    assert close(to_pixels(image, pre)[0], by_transformers(image, pre))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_batches_of_arrays(count):
    pixels = np.stack([picture(seed=seed) for seed in range(count)])
    expected = torch.cat([to_pixels(one, PRE) for one in pixels])
    assert torch.equal(to_pixels(pixels, PRE), expected)
    assert torch.equal(to_pixels(pixels.transpose(0, 3, 1, 2), PRE), expected)
    grey = pixels[..., 0]
    expected = torch.cat([to_pixels(one, PRE) for one in grey])
    assert torch.equal(to_pixels(grey[:, None], PRE), expected)
    assert torch.equal(to_pixels(grey[..., None], PRE), expected)
    if count != 3:
        assert torch.equal(to_pixels(grey, PRE), expected)


def test_a_list_of_mixed_sizes_and_kinds_keeps_its_order():
    a, b, c = picture(20, 30), picture(64, 33, seed=1), picture(10, 10, 1, seed=2)[..., 0]
    mixed = [Image.fromarray(a), tensor(b), c, b]
    expected = [to_pixels(one, PRE) for one in (a, b, c, b)]
    assert torch.equal(to_pixels(mixed, PRE), torch.cat(expected))
    assert torch.equal(to_pixels(tuple(mixed), PRE), torch.cat(expected))


def test_arguments_are_left_alone():
    pixels, image = picture(), Image.fromarray(picture()).convert("RGBA")
    before, known = pixels.copy(), image.copy()
    to_pixels([pixels, image, tensor(pixels)], PRE)
    assert np.array_equal(pixels, before)
    assert image.mode == "RGBA"
    assert image.tobytes() == known.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "LA", "YCbCr"])
def test_modes_of_pil(mode):
    image = Image.fromarray(picture()).convert(mode)
    assert close(to_pixels(image, PRE)[0], by_transformers(image))


def transparent(mode):
    """Red everywhere, and nowhere to be seen but in the left half."""
    image = Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, SIZE // 2, SIZE))
    if mode == "P":  # one colour of the palette is transparent
        image = Image.new("P", (SIZE, SIZE), 1)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.paste(0, (0, 0, SIZE // 2, SIZE))
        image.info["transparency"] = 1
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGBa"])
def test_transparency_is_laid_over_white(mode):
    image = transparent(mode)
    ours = to_pixels(image, PRE)[0]
    assert ours[:, 0, 0].tolist() == [255, 0, 0]
    assert ours[:, 0, -1].tolist() == [255, 255, 255]
    if mode != "RGBa":  # transformers does not know this one
        assert close(ours, by_transformers(image))


def test_half_transparent_by_hand():
    # 0.5 of 200 and 0.5 of 255, alpha being 128 of 255: 255 - 55 * 128 / 255 = 227.39
    image = Image.new("LA", (SIZE, SIZE), (200, 128))
    assert to_pixels(image, PRE).unique().tolist() == [227]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_taken_as_they_are(dtype):
    values = torch.randn(2, 3, SIZE, SIZE).to(dtype)
    assert to_pixels(values, PRE) is values
    for form in ([values], list(values), [values[:1], values[1]]):
        assert torch.equal(to_pixels(form, PRE), values)
        assert to_pixels(form, PRE).dtype == dtype


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_float_arrays(dtype):
    values = np.random.default_rng(0).normal(size=(2, 3, SIZE, SIZE)).astype(dtype)
    for form in (values, list(values)):
        ours = to_pixels(form, PRE)
        assert ours.numpy().dtype == values.dtype.newbyteorder("=")
        assert np.array_equal(ours.numpy(), values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tensor_is_resized_on_the_cpu():
    pixels = tensor(picture())
    ours = to_pixels(pixels.cuda(), PRE)
    assert ours.device.type == "cpu"
    assert torch.equal(ours, to_pixels(pixels, PRE))
    values = torch.zeros(1, 3, SIZE, SIZE, device="cuda")
    assert to_pixels(values, PRE) is values


U8 = np.uint8
GIVE = "Give uint8 or PIL"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "at least one picture, got an empty list"),
        ((), "at least one picture, got an empty tuple"),
        (None, r"images must be uint8 pictures .* or floating point .*, got NoneType\.$"),
        ({"pixel_values": 1}, r"got dict\.$"),
        (3, r"got int 3\.$"),
        ("a.png", r"got str 'a.png'\. Open files with PIL.Image.open"),
        ([picture(), "a.png"], r"images\[1\] must be .*got str 'a.png'\. Open files"),
        ([[picture()]], r"images\[0\] must be .*, got list\.$"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), r"got torch.int64 of shape \(2, 3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.bool), "must be uint8 pictures.*got torch.bool"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), "got torch.complex64"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), r"length 0, got .*\(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 0, 8, dtype=torch.uint8), r"length 0, got .*\(1, 3, 0, 8\)"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"\(C, H, W\), channels first, .*\(8, 8\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"channels first, .*\(8, 8, 3\)"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), r"C 1 or 3, .*\(2, 4, 8, 8\).*PIL images"),
        (torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), r"\(1, 1, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8), rf"\(n, 3, 32, 32\).*float32 of shape \(1, 3, 8, 8\)\. {GIVE}"),
        (torch.zeros(3, SIZE, SIZE), r"\(n, 3, 32, 32\).*of shape \(3, 32, 32\)"),
        (torch.zeros(0, 3, SIZE, SIZE), r"n at least 1.*\(0, 3, 32, 32\)"),
        (torch.zeros(1, 1, SIZE, SIZE), r"\(n, 3, 32, 32\).*\(1, 1, 32, 32\)"),
        ([torch.zeros(3, 8, 8)], r"images\[0\] of floating point must be \(n, 3, 32, 32\)"),
        ([torch.zeros(3, SIZE, SIZE), picture()], "all uint8 or PIL, or all.*float32.*uint8"),
        ([torch.zeros(3, SIZE, SIZE), torch.zeros(3, SIZE, SIZE).half()], "float16 .*float32"),
        (np.zeros((8, 8, 3)), r"\(n, 3, 32, 32\).*float64 of shape \(8, 8, 3\)"),
        (np.zeros((2, 8, 8), np.int64), r"got a numpy array of int64 of shape \(2, 8, 8\)\.$"),
        (np.zeros((8, 8), bool), "got a numpy array of bool"),
        (np.zeros((8, 8), object), "got a numpy array of object"),
        (np.zeros((2, 3, SIZE, SIZE), np.complex64), "got a numpy array of complex64"),
        (np.zeros((8, 8), np.uint16), r"uint16 of shape \(8, 8\).*\(x // 256\).astype\('uint8'\)"),
        (np.zeros((3, 8, 8), U8), r"read in one way, got a numpy array of uint8 .*\(3, 8, 8\)"),
        (np.zeros((3, 8, 3), U8), r"read in one way.*\(3, 8, 3\). Give channels first as a torch"),
        (np.zeros((2, 3, 8, 3), U8), r"read in one way.*\(2, 3, 8, 3\)"),
        (np.zeros((8, 8, 4), U8), r"read in one way.*\(8, 8, 4\).*four channels .* PIL images"),
        (np.zeros((8, 8, 2), U8), r"read in one way.*\(8, 8, 2\)"),
        (np.zeros((2, 8, 8, 4), U8), r"read in one way.*\(2, 8, 8, 4\)"),
        (np.zeros((8,), U8), r"read in one way.*\(8,\)"),
        (np.zeros((1, 2, 8, 8, 3), U8), r"read in one way.*\(1, 2, 8, 8, 3\)"),
        (np.zeros((0, 8, 8, 3), U8), r"\(0, 8, 8, 3\)"),
        (np.zeros((0, 8), U8), r"\(0, 8\)"),
        (Image.new("I;16", (6, 8)), r"8 bits.*mode I;16, 6 x 8 pixels, .*// 256"),
        (Image.new("I", (6, 8)), "8 bits per channel, got a PIL image of mode I,"),
        (Image.new("F", (6, 8)), "8 bits per channel, got a PIL image of mode F,"),
        (Image.new("La", (6, 8)), "cannot be read or brought to RGB, got a PIL image of mode La"),
        (Image.new("RGB", (0, 8)), "length 0"),
    ],
)
def test_what_is_no_picture_has_its_line(wrong, message):
    with pytest.raises(FedloraError, match=message) as caught:
        to_pixels(wrong, PRE)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="is a float64 here")
def test_floats_that_torch_does_not_know():
    with pytest.raises(FedloraError, match=r"got a numpy array of .* \(1, 3, 32, 32\)"):
        to_pixels(np.zeros((1, 3, SIZE, SIZE), np.longdouble), PRE)


def test_the_way_out_for_16_bits_works():
    deep = np.full((8, 8), 40_000, np.uint16)
    image = Image.fromarray((np.asarray(Image.fromarray(deep)) // 256).astype("uint8"))
    assert to_pixels(image, PRE).unique().tolist() == [40_000 // 256]


def test_a_broken_file(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    message = r"images\[1\] cannot be read.*truncated"
    with Image.open(tmp_path / "a.png") as image, pytest.raises(FedloraError, match=message):
        to_pixels([picture(), image], PRE)


def test_pil_is_not_imported():
    code = (
        "import sys, torch, fedlora.data.pictures as p, fedlora.data.preprocess as q; "
        "pre = q.ImagePreprocess(8, True, (0,) * 3, (1,) * 3); "
        "p.to_pixels(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), pre); print('PIL' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_every_integer_type(dtype):
    values = np.array([2, 0, 1], dtype)
    forms = [values, torch.from_numpy(values), list(values), list(torch.from_numpy(values))]
    for form in (*forms, values.tolist(), tuple(values.tolist())):
        ours = to_labels(form, 3, 3)
        assert ours.dtype == torch.int64
        assert ours.tolist() == [2, 0, 1]


def test_one_label_of_one_picture():
    for form in (4, np.int16(4), np.array(4), torch.tensor(4), [4], torch.tensor([4])):
        ours = to_labels(form, 1, 5)
        assert ours.dtype == torch.int64
        assert ours.tolist() == [4]


def test_labels_are_a_copy():
    values = torch.tensor([0, 1])
    to_labels(values, 2, 2)[0] = 1
    assert values.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0, 1], r"one per picture, got 2 for 3 picture\(s\)"),
        ([], "got 0 for 3"),
        (1, "got 1 for 3"),
        (torch.tensor([0, 1, 2, 0]), "got 4 for 3"),
        ([0, 5, 1], r"between 0 and 4 \(there are 5 classes\), got 5"),
        (np.array([0, -1, 1]), "between 0 and 4 .*got -1"),
        (np.array([0, 2**64 - 1, 1], np.uint64), "got 18446744073709551615"),
        ([0, 2**70, 1], "got 1180591620717411303424"),
        ([0, 1.0, 1], "whole numbers, one per picture .*, got float 1.0"),
        ([0, True, 1], "got bool True"),
        ([0, np.True_, 1], "got bool"),
        ([0, None, 1], "got NoneType"),
        ([0, [1], 1], "got list"),
        ([0, torch.tensor([1]), 1], r"got torch.int64 of shape \(1,\)"),
        ([0, torch.tensor(1.0), 1], "got torch.float32"),
        ("cat", "got str 'cat'"),
        (None, "got NoneType"),
        (torch.tensor([0.0, 1, 2]), r"shape \(n,\), got torch.float32 of shape \(3,\)"),
        (torch.tensor([True, False, True]), "got torch.bool"),
        (np.array([0.0, 1, 2]), "got a numpy array of float64"),
        (np.array([True, False, True]), "got a numpy array of bool"),
        (np.array(["a", "b", "c"]), "got a numpy array of <U1"),
        (torch.zeros(3, 5, dtype=torch.int64), r"shape \(3, 5\). Give class indices, not scores"),
    ],
)
def test_wrong_labels_have_their_line(wrong, message):
    with pytest.raises(FedloraError, match=message) as caught:
        to_labels(wrong, 3, 5)
    assert "\n" not in str(caught.value)
