from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.arguments import complete, find_config
from fedlora.errors import FedloraError
from fedlora.explain import explain


def union(key: str, members: str, given: str) -> Exception:
    """As jsonargparse says that a value is none of a union's members."""
    return Exception(
        f'Parser key "{key}":\n  Does not validate against any of the Union subtypes\n  Subtypes: '
        f"[]\n  Errors:\n{members}  Given value type: <class 'str'>\n  Given value: {given}"
    )


def member(kind: str) -> str:
    return f"    - Expected a <class '{kind}'>\n"


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (["tuple", "list"], "a.b: should be a list such as [x] but got x."),
        (["list", "NoneType"], "a.b: should be a list such as [x] but got x."),
        (["int", "float", "NoneType"], "a.b: should be of type int or float but got x."),
        (["list", "bool"], "a.b: should be of type list or bool but got x."),
    ],
    ids=str,
)
def test_a_union_in_words(members: list[str], said: str) -> None:
    assert explain(union("a.b", "".join(map(member, members)), "x"), []) == said


def test_a_wrong_entry_of_a_list_is_named_once() -> None:
    entry = "    - Expected a <class 'str'>. Got value: 1\n"
    assert explain(union("a.b", 2 * entry, "[1]"), []) == "a.b: should be of type str but got 1."


def test_only_the_member_that_can_be_mended_is_named() -> None:
    text = "    - Expected a dot import path string: abc\n" + member("list") + member("bool")
    assert explain(union("trainer.logger", text, "abc"), []) == (
        "trainer.logger: there is no class abc."
    )


def test_a_home_folder_that_nobody_has() -> None:
    with pytest.raises(FedloraError, match=r"^--config '~nosuchuser/x': there is no home folder"):
        find_config("~nosuchuser/x")


@pytest.mark.parametrize("r", ["&a [*a]", "2020-01-01"])
def test_a_plain_config_whose_values_are_none(r: str, tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text(f"model: {{type: clip_lora}}\nlora: {{r: {r}}}\n")
    with pytest.raises(FedloraError, match=r"plain\.yaml: model and lora must hold plain values"):
        complete(["fit", "--config", str(file)])
