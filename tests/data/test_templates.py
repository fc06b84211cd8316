from __future__ import annotations

import pytest

from fedlora.data.templates import check_templates
from fedlora.errors import FedloraError


def test_prompts_with_one_place_are_taken() -> None:
    assert check_templates(("a photo of a {}.", "{}")) == ["a photo of a {}.", "{}"]


@pytest.mark.parametrize("templates", [[], (), "a photo of a {}."])
def test_no_list_of_prompts(templates: object) -> None:
    with pytest.raises(FedloraError, match="a list of at least one prompt"):
        check_templates(templates)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "a {name}", "{", "{}}"])
def test_no_place_or_more_than_one(template: str) -> None:
    with pytest.raises(FedloraError, match=r"exactly one \{\} each"):
        check_templates(["{}", template])
