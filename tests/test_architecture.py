"""Sizes and directions that keep the house in order."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from statistics import median

import pytest

from fedlora.aggregation import RULES

SRC = Path(__file__).parents[1] / "src" / "fedlora"
FILES = sorted(SRC.rglob("*.py"))
# A layer may import those before it and itself; the rest of the package is above all of them.
ALLOWED = {
    "state": set(),
    "sampling": {"state", "errors"},
    "round_lr": {"errors"},
    "errors": set(),
    "flat": set(),
    "distributed": {"distributed", "errors", "flat"},
    "low_rank": {"state"},
    "dependencies": {"errors"},
    "files": {"errors"},
    "aggregation": {"aggregation", "state", "sampling", "errors", "flat", "low_rank"},
    "testing": {"testing", "aggregation", "state", "sampling", "errors"},
    "modules": {
        "modules",
        "state",
        "sampling",
        "errors",
        "files",
        "flat",
        "data.preprocess",
        "data.pictures",
        "data.templates",
    },
    "data": {"data", "state", "sampling", "errors", "files"},
    "engines": {
        "engines",
        "aggregation",
        "modules",
        "data",
        "distributed",
        "personal",
        "state",
        "sampling",
        "errors",
        "flat",
    },
    "callbacks": {"callbacks", "aggregation", "state", "errors", "files", "modules.report"},
}


def imports(path: Path, runtime_only: bool = True) -> set[str]:
    """Modules of the package that a file imports, without those for type checkers only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if runtime_only and isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedlora"):
            base = (node.module or "").removeprefix("fedlora").removeprefix(".")
            found |= {base} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("fedlora.")]
            found |= {name.removeprefix("fedlora.") for name in names}
    return found


def test_there_is_something_to_guard() -> None:
    assert len(FILES) > 30
    assert {path.relative_to(SRC).parts[0].removesuffix(".py") for path in FILES} >= set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_a_file_is_small_and_well_named(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    assert path.stem not in ("utils", "helpers", "common")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_one_way(path: Path) -> None:
    layer = path.relative_to(SRC).parts[0].removesuffix(".py")
    if layer not in ALLOWED:
        return
    for name in imports(path):
        assert any(name == ok or name.startswith(f"{ok}.") for ok in ALLOWED[layer]), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_what_must_not_exist(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        if isinstance(node, ast.Global):
            raise AssertionError(f"global state in line {node.lineno}")
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", "")}
            assert "pickle" not in modules
    text = path.read_text()
    assert "weights_only=False" not in text
    assert "deepcopy(model" not in text
    if path.name not in ("local.py", "federated_classifier.py"):
        # One local loop; a federated model's train_step is a step, not a loop.
        assert ".backward(" not in text


RULE_LINES = {
    rule.__name__: len(Path(inspect.getfile(rule)).read_text().splitlines())
    for rule in RULES.values()
}


def test_a_rule_is_a_small_file() -> None:
    assert median(RULE_LINES.values()) <= 60
    assert max(RULE_LINES.values()) <= 100, RULE_LINES


def test_importing_the_package_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, fedlora; print({'torch', 'lightning', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_can_be_imported() -> None:
    import fedlora

    for name in fedlora.__all__:
        assert getattr(fedlora, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = fedlora.nothing
