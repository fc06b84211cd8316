"""Prompts made of a class name."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.errors import FedloraError

# Where nobody says how a class is to be named.
DEFAULT_TEMPLATES = ("a photo of a {}.",)


def check_templates(templates: Sequence[str]) -> list[str]:
    """The templates as a list, if each is a prompt with one place for the class name.

    Raises:
        FedloraError: for something else, and where there is none.
    """
    if isinstance(templates, str) or not templates:
        raise FedloraError(
            f"templates must be a list of at least one prompt, got {templates!r}. Write for "
            'example ["a photo of a {}."], or leave it out.'
        )
    for template in templates:
        rest = template.replace("{}", "", 1)
        if rest == template or "{" in rest or "}" in rest:
            raise FedloraError(
                "templates must have exactly one {} each, where the class name goes, "
                f'got "{template}". Write for example "a photo of a {{}}.".'
            )
    return list(templates)
