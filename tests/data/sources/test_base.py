from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.data.sources.base import ImageSource, ImageTable
from fedlora.data.sources.digits import Digits


class Nothing(ImageSource):
    """The least that a source must have."""

    @property
    def class_names(self):
        return ["a", "b"]

    def load(self):
        return ImageTable(np.array([0, 1]), np.array(["train", "test"]), np.array(["k1", "k0"]))

    def read(self, rows):
        return [torch.zeros(3, 4, 4 + row, dtype=torch.uint8) for row in rows]


def test_a_source_is_three_methods():
    source = Nothing(["a photo of a {}."])
    source.prepare()
    assert source.templates == ["a photo of a {}."]
    assert len(source.load()) == 2
    with pytest.raises(TypeError, match="abstract"):
        ImageSource(["a {}."])


@pytest.mark.parametrize("bad", ["a photo", "{} or {}", "{name}", "{} {", "{{}}"])
def test_templates_have_one_place_for_the_name(bad):
    with pytest.raises(ValueError, match=r"templates must have exactly one \{\} each"):
        Nothing(["a photo of a {}.", bad])
    with pytest.raises(ValueError, match=r"templates must have exactly one \{\} each"):
        Digits(templates=[bad])


def test_no_template():
    with pytest.raises(ValueError, match="templates must be a list of at least one prompt"):
        Digits(templates=[])


def test_templates_cannot_be_changed_from_outside():
    source = Digits()
    source.templates.append("no place")
    assert len(source.templates) == 4


def test_digits_pixels_by_hand():
    # scikit-learn's first picture, a zero, begins 0 0 5 13 9 1 0 0; 16 levels to 255.
    source = Digits()
    assert source.load().labels[0] == 0
    image = source.read([0, 5])
    assert image.shape == (2, 1, 8, 8)
    assert image.dtype == torch.uint8
    assert image[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert source.read(range(1797)).max() == 255


def test_digits_table():
    table = Digits().load()
    assert len(table) == 1797
    assert table.labels.dtype == np.int64
    assert len(Digits().class_names) == 10
    assert Digits().templates[0] == "a photo of the digit {}."
    assert table.site is None
    assert len(set(table.keys.tolist())) == 1797


def test_digits_test_split_is_stratified_and_always_the_same():
    table = Digits().load()
    test = table.split == "test"
    assert test.sum() == 359  # 0.2 * 1797 = 359.4
    assert set(table.split) == {"train", "test"}
    total, held = np.bincount(table.labels), np.bincount(table.labels[test])
    assert (np.abs(held - 0.2 * total) < 1).all()
    assert np.array_equal(test, Digits().load().split == "test")
    assert not test[:360].all()
    assert (Digits(test_fraction=0.5).load().split == "test").sum() == 899  # 898.5


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_test_fraction(fraction):
    with pytest.raises(ValueError, match=f"test_fraction must be between 0 and 1.*{fraction}"):
        Digits(test_fraction=fraction)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"split": np.array(["train"])},
            r"split must have one value per label, shape \(2,\), got \(1,\)",
        ),
        ({"site": np.array([["a"], ["b"]])}, "site must have one value per label"),
        (
            {"split": np.array(["train", "valid"])},
            "split must be one of train, val, test, got 'valid'",
        ),
        ({"keys": np.array(["a", "a"])}, "keys must be distinct"),
        ({"labels": np.array([0.0, 1.0])}, r"labels must be whole numbers.*got float64 of shape"),
        ({"labels": np.zeros((2, 2), int)}, r"labels must be .*one per picture.*shape \(2, 2\)"),
        ({"site": np.array(["a", ""])}, "site must not be empty, as it is in row 1"),
    ],
)
def test_table_checks_its_columns(change, message):
    good = {"labels": np.array([0, 1]), "split": np.array(["train"] * 2), "keys": np.arange(2)}
    with pytest.raises(ValueError, match=message):
        ImageTable(**{**good, **change})
