from __future__ import annotations

import numpy as np
import pytest

from fedlora.data.sources.classes import check_class_names, did_you_mean, label_rows, listed
from fedlora.errors import FedloraError

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def labels_of(found, given=None, what="class folder"):
    labels, names = label_rows(found, given, what)
    assert labels.dtype == np.int64
    return labels.tolist(), names


def test_names_in_their_order():
    assert labels_of(["b", "C", "a", "b"]) == ([2, 0, 1, 2], ["C", "a", "b"])
    assert labels_of(np.array(["b", "a"])) == ([1, 0], ["a", "b"])


def test_integers_by_number():
    found = ["10", "9", "-1", "10", "2"]
    assert labels_of(found) == ([3, 2, 0, 3, 1], ["-1", "2", "9", "10"])
    assert labels_of(["1", "01", "2"]) == ([1, 0, 2], ["01", "1", "2"])
    # One that is no integer, and all are text.
    assert labels_of(["10", "9", "x"])[1] == ["10", "9", "x"]
    assert labels_of(["10", "9", "1.5"])[1] == ["1.5", "10", "9"]


def test_a_list_says_the_order():
    assert labels_of(["a", "b", "b"], ["b", "a"]) == ([1, 0, 0], ["b", "a"])


def test_case_tells_classes_apart_where_the_user_says_so():
    assert labels_of(["a", "A", "a"], ["a", "A"]) == ([0, 1, 0], ["a", "A"])


def test_a_dict_says_order_and_names():
    given = {"n02": "cat", "n01": "tench"}
    assert labels_of(["n01", "n02", "n01"], given) == ([1, 0, 1], ["cat", "tench"])


def test_numbers_of_yaml_are_text():
    assert labels_of(["1", "0"], [0, 1]) == ([1, 0], ["0", "1"])
    assert labels_of(["1", "0"], {0: "zero", 1: "one"}) == ([1, 0], ["zero", "one"])


@pytest.mark.parametrize("given", [None, [DECOMPOSED, "bar"], {DECOMPOSED: DECOMPOSED, "bar": "b"}])
def test_one_name_in_two_unicode_forms_is_one_class(given):
    labels, names = labels_of([COMPOSED, "bar", DECOMPOSED], given)
    assert labels[0] == labels[2] != labels[1]
    assert COMPOSED in names
    assert len(names) == 2


def test_underscores_and_spaces_stay():
    assert labels_of(["polar_bear", " x "])[1] == [" x ", "polar_bear"]


def test_what_is_given_is_not_changed():
    given = ["b", "a"]
    _, names = label_rows(["a", "b"], given, "folder")
    names.append("c")
    assert given == ["b", "a"]


@pytest.mark.parametrize(
    ("found", "given", "message"),
    [
        (
            ["cat", "taby"],
            ["cat", "tabby"],
            r"^data.source.class_names lists 'tabby' but there is no class folder of that name, "
            r"found 'taby'. Did you mean 'taby'\?$",
        ),
        (["cat", "dog"], ["cat", "dog", "emu"], r"lists 'emu'.*found 'cat', 'dog'. Leave it out.$"),
        (["cat", "dog"], {"cat": "a", "emu": "b"}, "lists 'emu' .*found 'dog'"),
        (["cat", "dog", "emu"], ["emu", "cat"], "must list every class folder, 'dog' is missing"),
        (["x", "x"], None, r"there is one class only, 'x' \(each class folder is a class\)"),
        (["x", "x"], ["x"], "there is one class only, 'x'"),
        ([], None, "there is no class "),
        (["x", " "], None, r"a class folder is empty \(' '\)"),
        (["x", "caf\udce9"], None, r"a class folder is not valid Unicode, 'caf\\udce9'"),
        (["cat", "dog", "Cat"], None, r"^'Cat' and 'cat' \(each .*\) differ in case only"),
        (
            ["0", "1"],
            ["zero", "one"],
            r"found '0', '1'. Write a dict from what there is to names, \{0: zero, ...\}.$",
        ),
    ],
)
def test_what_does_not_fit_the_data(found, given, message):
    with pytest.raises(FedloraError, match=message) as raised:
        label_rows(found, given, "class folder")
    assert "\n" not in str(raised.value)


def test_a_thousand_classes_do_not_fill_the_screen():
    found = [f"class {i:04}" for i in range(1000)]
    with pytest.raises(FedloraError, match="and 993 more is missing") as raised:
        label_rows(found, found[:1], "folder")
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cat", "class_names must be a list of names, or a dict .* got 'cat'"),
        ([], r"must be a list of names.*got \[\]"),
        ({}, "must be a list of names.*got {}"),
        ([1.5, 2], r"must hold text only, got 1.5. Write it in quotes: '1.5'"),
        (["yes", True], "must hold text only, got True"),
        ({"a": None}, "must hold text only, got None"),
        ({True: "a"}, "must hold text only, got True"),
        (["a", ""], "must not hold empty names, got ''"),
        ({"a": " "}, "must not hold empty names, got ' '"),
        (["a", "b", "a"], "must be distinct, got 'a' twice"),
        ({"x": "a", "y": "a"}, "must be distinct, got 'a' twice"),
        ([COMPOSED, DECOMPOSED], "must be distinct"),
        ({0: "a", "0": "b"}, "must be distinct, got '0' twice"),
    ],
)
def test_what_no_data_could_fit(given, message):
    with pytest.raises(FedloraError, match=message):
        check_class_names(given)
    with pytest.raises(FedloraError, match=message):
        label_rows(["a", "b"], given, "folder")


def test_nothing_given_is_nothing_to_check():
    assert check_class_names(None) is None
    assert check_class_names([DECOMPOSED]) == [COMPOSED]


def test_words_for_messages():
    assert listed([]) == ""
    assert listed("abcdefg") == "'a', 'b', 'c', 'd', 'e', 'f' and 1 more"
    assert did_you_mean("zebra", ["cat"]) == ""
