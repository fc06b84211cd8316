"""Whether the packages underneath are there and new enough, asked before the first heavy import."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from fedlora.errors import DependencyError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Too old a version of these ends deep inside an import, in a line about something else.
_CHECKED = frozenset({"torch", "lightning", "transformers", "peft"})


@cache  # once per process; an error is not kept, so a notebook can install and go on
def check() -> None:
    """Compare the installed versions with the lower bounds that fedlora was installed with.

    Upper bounds are left to pip: what is newer than anything tried may well work. Where fedlora
    was never installed (a source tree on the path) there is nothing to compare with.

    Raises:
        DependencyError: naming all that is missing or too old, and the command that mends it.
    """
    try:
        declared = metadata.requires("fedlora") or []
    except metadata.PackageNotFoundError:
        return
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError as error:
        raise DependencyError(
            "fedlora needs packaging and finds none. Run: python -m pip install packaging"
        ) from error
    found, mend = [], []
    for requirement in map(Requirement, declared):
        if requirement.name.lower() not in _CHECKED or not _applies(requirement):
            continue
        version = _installed(requirement.name)
        if version is None or _too_old(version, requirement):
            # Sorted so, the lower bound comes first, as people write it.
            bounds = ",".join(sorted(map(str, requirement.specifier), reverse=True))
            found.append(f"{requirement.name}{bounds} and finds {version or 'none'}")
            mend.append(f'"{requirement.name}{bounds}"')
    if found:
        raise DependencyError(
            f"fedlora needs {'; '.join(found)}. Run: python -m pip install {' '.join(mend)}"
        )


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)  # None where an uninstall left an empty folder behind
    except metadata.PackageNotFoundError:
        return None


def _too_old(found: str, requirement: Requirement) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        version = Version(found)
    except InvalidVersion:  # a build with a name of its own: nothing says that it is old
        return False
    lowest = [bound.version for bound in requirement.specifier if bound.operator in (">=", "~=")]
    # Version and not SpecifierSet, which leaves pre-releases out unless told.
    return any(version < Version(bound) for bound in lowest)
