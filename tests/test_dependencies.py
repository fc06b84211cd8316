from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import fedlora
from fedlora.dependencies import check
from fedlora.errors import DependencyError, FedloraError

DECLARED = [
    "lightning<3,>=2.6.4",
    "peft<1,>=0.21",
    "rich<15,>=14",
    "torch<2.14,>=2.6",
    "transformers<6,>=5",
    "torch>=99; extra == 'dev'",
    "peft>=99; python_version < '3'",
]
FINE = {"lightning": "2.6.4", "peft": "0.21.0", "torch": "2.13.0", "transformers": "5.0"}
PEFT = 'fedlora needs peft>=0.21,<1 and finds {}. Run: python -m pip install "peft>=0.21,<1"'


@pytest.fixture(autouse=True)
def _not_asked_before() -> None:
    check.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Pretend that these are installed, None being none; returns the list of who is asked for."""

    def pretend(**versions: str | None) -> list[str]:
        installed = {**FINE, **versions}
        asked: list[str] = []

        def version(name: str) -> str:
            asked.append(name)
            found = installed.get(name)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(metadata, "requires", {"fedlora": DECLARED}.__getitem__)
        monkeypatch.setattr(metadata, "version", version)
        return asked

    return pretend


@pytest.mark.parametrize(
    "versions",
    [
        {},
        {"torch": "2.13.0+cpu"},
        {"torch": "2.6.0+cu124"},
        {"torch": "2.7.0.dev20250301+cu126"},  # a pre-release, and above the bound
        {"peft": "0.22.0rc1"},
        {"peft": "0.21.1.dev0"},
        {"peft": "0.100"},
        {"torch": "3.1", "transformers": "6.0", "peft": "1.0"},  # too new is left to pip
        {"torch": "our-own-build"},
    ],
)
def test_good_enough(versions: dict[str, str], install: Callable[..., list[str]]) -> None:
    install(**versions)
    check()


@pytest.mark.parametrize(
    "found", ["0.15.2", "0.3", "0.20.99", "0.21.0rc1", "0.21.0.dev0", "0.20+ours"]
)
def test_too_old(found: str, install: Callable[..., list[str]]) -> None:
    install(peft=found)
    with pytest.raises(DependencyError) as caught:
        check()
    assert str(caught.value) == PEFT.format(found)


def test_missing(install: Callable[..., list[str]]) -> None:
    install(peft=None)
    with pytest.raises(DependencyError) as caught:
        check()
    assert str(caught.value) == PEFT.format("none")
    assert isinstance(caught.value, FedloraError)
    assert isinstance(caught.value, ImportError)


def test_what_an_uninstall_left_behind_is_missing(
    install: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    monkeypatch.setattr(metadata, "version", {**FINE, "peft": None}.__getitem__)
    with pytest.raises(DependencyError, match=r"peft>=0\.21,<1 and finds none"):
        check()


def test_all_that_is_wrong_is_in_one_line(install: Callable[..., list[str]]) -> None:
    install(peft="0.15.2", torch=None, transformers="4.57.1")
    with pytest.raises(DependencyError) as caught:
        check()
    assert str(caught.value) == (
        "fedlora needs peft>=0.21,<1 and finds 0.15.2; torch>=2.6,<2.14 and finds none; "
        "transformers>=5,<6 and finds 4.57.1. Run: python -m pip install "
        '"peft>=0.21,<1" "torch>=2.6,<2.14" "transformers>=5,<6"'
    )


def test_asked_once_when_all_is_well_and_again_after_an_error(
    install: Callable[..., list[str]],
) -> None:
    install(peft="0.15.2")
    for _ in range(2):
        with pytest.raises(DependencyError):
            check()
    asked = install()
    check()
    check()
    assert sorted(asked) == sorted(FINE)  # each once, and nothing but these


def test_nothing_is_checked_where_fedlora_was_not_installed(
    install: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    install(peft=None)
    monkeypatch.setattr(metadata, "requires", requires)
    check()
    monkeypatch.setattr(metadata, "requires", {"fedlora": None}.__getitem__)
    check.cache_clear()
    check()


def test_without_packaging(
    install: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    with pytest.raises(DependencyError, match=r"needs packaging and finds none\. Run: "):
        check()


def test_public_names_ask_first(install: Callable[..., list[str]]) -> None:
    install(peft="0.15.2", fedlora="0.1.0")
    assert fedlora.FedloraError is FedloraError
    assert fedlora.__version__ == "0.1.0"
    for name in set(fedlora.__all__) - {"FedloraError", "__version__"}:
        with pytest.raises(DependencyError, match=r"peft>=0\.21,<1 and finds 0\.15\.2"):
            getattr(fedlora, name)


def test_the_four_that_are_checked_are_among_the_dependencies_with_a_lower_bound() -> None:
    from packaging.requirements import Requirement

    from fedlora.dependencies import _CHECKED

    declared = map(Requirement, metadata.requires("fedlora") or [])
    bounded = {found.name for found in declared if ">=" in str(found.specifier)}
    assert bounded >= _CHECKED


def python(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "FEDLORA_DEBUG"}
    inherited = env.get("PYTHONPATH")
    places = [str(path) if path else None, inherited]
    env["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=False, env=env
    )


def test_a_real_old_peft(tmp_path: Path) -> None:
    info = tmp_path / "peft-0.15.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.15.2\n")
    # Whoever imports torch before asking ends here.
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported too early')\n")
    bounds = next(r for r in metadata.requires("fedlora") or [] if r.startswith("peft"))
    assert ">=0.21" in bounds
    done = python("-m", "fedlora", "fit", path=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"fedlora: {PEFT.format('0.15.2')}\n"
    done = python("-c", "from fedlora import LoRAConfig", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"DependencyError: {PEFT.format('0.15.2')}")
    done = python("-m", "fedlora", "--version", path=tmp_path)
    assert done.stdout == f"fedlora {fedlora.__version__}\n"


def test_importing_and_checking_bring_in_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import fedlora; "
        "assert not {'importlib.metadata', 'packaging'} & (set(sys.modules) - before); "
        "from fedlora.dependencies import check; check(); "
        "print({'torch', 'numpy', 'lightning', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "set()", done.stderr


def test_importing_is_quick() -> None:
    seconds = []
    for _ in range(3):  # the fastest, since other work may slow any of them down
        start = time.perf_counter()
        assert python("-c", "import fedlora").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
