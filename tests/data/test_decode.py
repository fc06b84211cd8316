from __future__ import annotations

import errno
import faulthandler
import gc
import io
import os
import random
import struct
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import PIL.ImageFile
import pytest
import torch

import fedlora.data.decode as module
from fedlora.data.decode import BadImageError, decode, read_all, to_rgb
from tests.data.mutations import mutated, small_pictures
from tests.data.odd_pictures import odd_pictures, write_odd_pictures
from tests.data.picture_bytes import app, chunk, colours, encode, exif, png, tensor
from tests.data.test_pictures import PRE, SQUARE, by_transformers, close, picture

ODD = {odd.name: odd for odd in odd_pictures()}
BEST = {"quality": 100, "subsampling": 0}


@pytest.fixture(autouse=True)
def nothing_hangs():
    faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


def check(odd, read):
    if odd.pixels is None:
        with pytest.raises(BadImageError, match=odd.why) as caught:
            decode(read)
        reason = str(caught.value)
        assert len(reason) < 200
        assert not any(part in reason for part in ("\n", " at 0x", odd.name))
        return
    pixels = decode(read)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == odd.pixels.shape
    assert pixels.int().sub(odd.pixels.int()).abs().max() <= odd.tolerance


@pytest.mark.parametrize(
    "odd", ODD.values(), ids=lambda odd: odd.name[:40].encode("ascii", "replace").decode()
)
def test_bytes(odd):
    check(odd, odd.content)


def test_files(tmp_path, monkeypatch):
    written = write_odd_pictures(tmp_path)
    assert len(written) > len(ODD) + 4
    monkeypatch.chdir(tmp_path)
    for odd in written:
        check(odd, odd.path)
        check(odd, odd.path.relative_to(tmp_path))


def test_read_all_keeps_the_order(tmp_path):
    written = write_odd_pictures(tmp_path)
    for pictures in ([odd.path for odd in written], [odd.content for odd in ODD.values()]):
        found = read_all(pictures)
        expected = written if pictures[0] == written[0].path else list(ODD.values())
        assert len(found) == len(expected)
        for odd, each in zip(expected, found, strict=True):
            assert isinstance(each, BadImageError) == (odd.outcome == "bad"), odd.name
            # Nothing that keeps the bytes of a bad picture in memory.
            assert odd.outcome == "ok" or (each.__traceback__, each.__context__) == (None, None)
    assert read_all([]) == []


def test_memory_is_ones_own():
    for name in ("rgb.png", "grey.png", "grey16.png", "transparent-rgba.png"):
        first = decode(ODD[name].content)
        first.zero_()
        assert decode(ODD[name].content).any()


# --- files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    done = []
    thread = threading.Thread(
        target=lambda: done.extend(read_all([tmp_path / "a.png"])), daemon=True
    )
    thread.start()
    thread.join(20)
    assert [str(error) for error in done] == ["not a regular file"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), "no permission to read it"),
        (OSError(errno.EIO, "Input/output error", "a.png"), "cannot be read: Input/output error"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), "no such file"),
    ],
)
def test_errors_of_the_file_system(error, why, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(BadImageError, match=f"^{why}$"):
        decode(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a\0b.png", "a\udc00\ud800.png", "x" * 300])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(BadImageError, match=r"^(no such file|cannot be read: File name too long)$"):
        decode(tmp_path / name)


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.write(ODD["rgb.png"].content)
        file.truncate(2**31)  # a hole: takes no space
    with pytest.raises(BadImageError, match=r"^2147483648 bytes, more than the 1431655760 "):
        decode(tmp_path / "a.png")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux")
def test_no_file_stays_open(tmp_path):
    written = write_odd_pictures(tmp_path)
    read_all([odd.path for odd in written])
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_all([odd.path for odd in written])
        gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert [str(each.message) for each in caught] == []


# --- limits


def test_bombs_are_refused_whatever_pil_allows(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImageError, match=r"4225000000 pixels.* limit of 178956970 pixels"):
        decode(ODD["bomb.png"].content)
    just_above = png((1, 178_956_971), 1, 0, b"")
    with pytest.raises(BadImageError, match=r"178956971 pixels.* limit of 178956970 pixels"):
        decode(just_above)
    monkeypatch.setattr(module, "MAX_PIXELS", 240)
    assert decode(ODD["rgb.png"].content).shape == (3, 12, 20)
    monkeypatch.setattr(module, "MAX_PIXELS", 239)
    with pytest.raises(BadImageError, match=r"240 pixels.* limit of 239 pixels"):
        decode(ODD["rgb.png"].content)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    def fail(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(module, "MAX_PIXELS", 239)
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", fail)
    with pytest.raises(BadImageError, match="240 pixels"):
        decode(ODD["rgb.png"].content)


@pytest.mark.parametrize("action", ["error", "always", "default"])
def test_warnings_do_not_leak(action, monkeypatch):
    # Large enough for PIL to warn of it, a malformed MPO, EXIF with an entry that is too long, an
    # animation without frames: each warns.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 200)
    jpeg = encode(colours(), "JPEG")
    entry = struct.pack(">HHHII", 1, 271, 2, 999, 8) + bytes(4)
    noisy = [
        encode(colours(), "PNG"),
        app(2, b"MPF\0II*\0\x08\0\0\0", jpeg),
        app(1, b"Exif\0\0MM\0*\0\0\0\x08" + entry, jpeg),
        png((1, 1), 8, 0, b"\0\0", chunk(b"acTL", bytes(8))),
    ]
    for content in noisy:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with PIL.Image.open(io.BytesIO(content)) as image:
                image.load()
                image.getexif()
        assert caught  # or there would be nothing to test
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        for content in noisy:
            assert decode(content).shape[0] in (1, 3)
    assert [str(each.message) for each in caught] == []


def test_only_warnings_of_pil_are_left_out():
    decode(ODD["rgb.png"].content)
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", stacklevel=1)
    with warnings.catch_warnings():
        decode(ODD["rgb.png"].content)
        decode(ODD["rgb.png"].content)
        before = list(warnings.filters)
        decode(ODD["rgb.png"].content)
        assert warnings.filters == before  # no filter more for each picture


# --- formats


def test_no_other_program_is_started(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("ghostscript")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", fail)
    eps = encode(colours(), "EPS")
    with pytest.raises(AssertionError, match="ghostscript"), PIL.Image.open(io.BytesIO(eps)) as one:
        one.load()
    with pytest.raises(BadImageError, match="not a picture of a known format"):
        decode(eps)


def test_a_pil_without_a_format(monkeypatch):
    without = {name: each for name, each in PIL.Image.OPEN.items() if name != "WEBP"}
    monkeypatch.setattr(PIL.Image, "OPEN", without)
    monkeypatch.setattr(module, "_formats", module._formats.__wrapped__)
    assert "WEBP" not in module._formats()
    assert decode(ODD["rgb.jpg"].content).shape == (3, 12, 20)
    webp = b"RIFF\x24\0\0\0WEBPVP8 " + bytes(24)
    with pytest.raises(BadImageError, match="not a picture of a known format"):
        decode(webp)


def test_pils_switch_for_truncated_pictures_is_left_alone():
    with pytest.raises(BadImageError, match=r"^truncated$"):
        decode(ODD["truncated.png"].content)
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_pil_does_it(orientation):
    from PIL.ImageOps import exif_transpose

    content = encode(picture(30, 40), "JPEG", exif=exif(orientation))
    with PIL.Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(exif_transpose(image))
    assert torch.equal(decode(content), tensor(expected))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_not_about_the_picture_goes_through(error, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", fail)
    with pytest.raises(error):
        decode(ODD["rgb.bmp"].content)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (MemoryError(), "^too large for the memory there is$"),
        (RecursionError("deep"), "^cannot be decoded: deep$"),
        (KeyError(7), "^cannot be decoded: 7$"),
        (AssertionError(), "^cannot be decoded: AssertionError$"),
        (
            ValueError("a\nb\x1b[31m <_io.BytesIO object at 0x7f> c"),
            r"^cannot be decoded: a b \[31m c$",
        ),
        (OSError("image file is truncated (3 bytes not processed)"), "^truncated$"),
        (struct.error("x" * 500), "^cannot be decoded: x{100}$"),
    ],
)
def test_whatever_pil_raises(error, why, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", fail)
    with pytest.raises(BadImageError, match=why):
        decode(ODD["rgb.bmp"].content)


def test_to_rgb_leaves_its_argument_alone():
    for mode in ("RGB", "RGBA", "LA", "P", "L", "1", "CMYK"):
        image = PIL.Image.fromarray(colours()).convert(mode)
        before = image.copy()
        assert to_rgb(image).mode == "RGB"
        assert (image.mode, image.tobytes()) == (before.mode, before.tobytes())


# --- the same as the model's own processor


SAVED = [(mode, "png") for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA")]
SAVED += [(mode, "jpg") for mode in ("L", "RGB", "CMYK")] + [("RGBA", "tif"), ("CMYK", "tif")]


@pytest.mark.parametrize("pre", [PRE, SQUARE])
@pytest.mark.parametrize(("mode", "kind"), SAVED)
@pytest.mark.parametrize(("height", "width"), [(28, 28), (50, 35), (300, 400), (20, 400)])
def test_agrees_with_transformers(tmp_path, height, width, mode, kind, pre):
    image = PIL.Image.fromarray(picture(height, width, 4), "RGBA")
    if mode in ("P", "PA"):  # one transparency per colour, and one colour that is transparent
        image = image.quantize(64)
        image.info |= {"transparency": 3} if mode == "PA" else {}
    else:
        image = image.convert(mode)
    path = tmp_path / f"a.{kind}"
    image.save(path)
    with PIL.Image.open(path) as theirs:
        assert close(pre.resize(decode(path)), by_transformers(theirs, pre))


# --- threads


def test_the_first_pictures_in_many_threads(tmp_path):
    code = (
        "import sys, pathlib, threading; from fedlora.data.decode import read_all\n"
        "paths = sorted(pathlib.Path(sys.argv[1]).iterdir()); found = [None] * 16\n"
        "start = threading.Barrier(16)\n"
        "def work(k): start.wait(); found[k] = read_all(paths[k:] + paths[:k])\n"
        "threads = [threading.Thread(target=work, args=(k,)) for k in range(16)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print({tuple(type(x).__name__ for x in each) for each in found})\n"
    )
    names = ["rgb.png", "rgb.jpg", "animated.gif", "palette.tiff", "rgb.bmp", "rgb.ppm"]
    for name in names:
        (tmp_path / name).write_bytes(ODD[name].content)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == str({("Tensor",) * 6})
    assert done.stderr == ""


def test_threads_do_not_disturb_each_other():
    # The filters of all threads change while pictures are decoded that PIL warns of.
    entry = struct.pack(">HHHII", 1, 271, 2, 999, 8) + bytes(4)
    noisy = app(1, b"Exif\0\0MM\0*\0\0\0\x08" + entry, encode(colours(), "JPEG"))
    contents = [noisy, *(odd.content for odd in ODD.values() if "tif" not in odd.name)] * 2
    expected = read_all(contents)
    with ThreadPoolExecutor(6) as threads:
        runs = [threads.submit(read_all, contents) for _ in range(6)]
        for _ in range(200):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
    for run in runs:
        for ours, theirs in zip(run.result(), expected, strict=True):
            assert type(ours) is type(theirs)
            assert (
                torch.equal(ours, theirs)
                if isinstance(ours, torch.Tensor)
                else str(ours) == str(theirs)
            )


# --- hostile bytes


@pytest.mark.parametrize("seed", range(4))
def test_mutated_pictures(seed, capfd):
    draw, whole = random.Random(seed), small_pictures()
    good = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(500):
            (found,) = read_all([mutated(draw, draw.choice(whole), draw.choice(whole))])
            if isinstance(found, BadImageError):
                assert not any(part in str(found) for part in ("\n", " at 0x"))
                continue
            good += 1
            assert found.dtype == torch.uint8
            assert found.ndim == 3
            assert found.shape[0] in (1, 3)
            assert found.numel() > 0
    assert 50 < good < 450  # both happen
    assert [str(each.message) for each in caught] == []
    assert capfd.readouterr() == ("", "")
