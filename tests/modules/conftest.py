from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_clip import make_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP on disk; never written to."""
    return make_folder(tmp_path_factory.mktemp("clip") / "small")
