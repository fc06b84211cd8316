"""Sources that find out what there is by one look at a disk or a hub."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fedlora.data.sources.base import ImageSource, ImageTable
from fedlora.data.sources.classes import ClassNames, check_class_names
from fedlora.data.templates import DEFAULT_TEMPLATES


@dataclass(frozen=True, eq=False)
class Found:
    """What a look showed."""

    class_names: list[str]
    table: ImageTable


F = TypeVar("F", bound=Found)


class ScannedSource(ImageSource, Generic[F]):
    """A source that looks once: in :meth:`prepare`, or when it is first asked.

    Args:
        class_names: as the user gives them.
        templates: prompts with one ``{}`` each; None for "a photo of a {}.".

    Raises:
        FedloraError: if an argument is not usable by itself.
    """

    def __init__(self, class_names: ClassNames, templates: Sequence[str] | None) -> None:
        self._given = check_class_names(class_names)
        self._seen: F | None = None
        super().__init__(DEFAULT_TEMPLATES if templates is None else templates)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the labels; looks if nobody has yet.

        Raises:
            FedloraError: as :meth:`prepare`.
        """
        return list(self._found.class_names)

    def prepare(self) -> None:
        """Look at what there is, anew if it was done before.

        Raises:
            FedloraError: if it is not there or cannot be used; says what to do.
        """
        self._seen = self._look()

    def load(self) -> ImageTable:
        """One row per picture.

        Raises:
            FedloraError: as :meth:`prepare`.
        """
        return self._found.table

    @property
    def _found(self) -> F:
        if self._seen is None:
            self._seen = self._look()
        return self._seen

    @abstractmethod
    def _look(self) -> F:
        """Find out what there is."""
