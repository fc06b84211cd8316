"""An environment for each tool, made once and kept, with the torch that fedlora runs on."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

NEEDS = {"pfl": ("pfl[pytorch]>=0.6,<0.7",), "flower": ("flwr[simulation]>=1.41,<1.42",)}
# What computes is the same everywhere, to the version. No torchvision: nobody needs it.
SAME = ("torch", "transformers", "peft", "safetensors", "numpy")
READY = "ready"  # written last


def python_of(tool: str, folder: Path, pip_options: list[str]) -> str:
    """The interpreter that a tool runs on; its environment is made if it is not there.

    Args:
        tool: ``bare`` and ``fedlora`` share the running interpreter's environment.
        folder: where environments are kept.
        pip_options: further ones of ``pip install``, such as ``--index-url``.

    Returns:
        Its path.

    Raises:
        SystemExit: where the packages cannot be had.
    """
    if tool not in NEEDS:
        return sys.executable
    place = folder / tool
    python, ready = place / "bin" / "python", place / READY
    wanted = [*(f"{name}=={version(name)}" for name in SAME), *NEEDS[tool]]
    if ready.exists() and ready.read_text(encoding="utf-8") == "\n".join(wanted):
        return str(python)
    print(f"{tool}: making an environment in {place}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    asked = [str(python), "-m", "pip", "install", "-qq", *pip_options, *wanted]
    if subprocess.run(asked, check=False).returncode:
        raise SystemExit(
            f"{tool}: pip could not install {' '.join(wanted)}. Where the build of torch comes "
            "from an index of its own, name it: --pip='--extra-index-url URL'."
        )
    ready.write_text("\n".join(wanted), encoding="utf-8")
    return str(python)
