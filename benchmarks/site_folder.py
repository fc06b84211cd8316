"""Fashion-MNIST (70,000 real pictures) as a folder of sites, for machines without the hub.

Debian's package ``dataset-fashion-mnist`` has the idx files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fedlora.data import FashionMNIST
from fedlora.sampling import derive_seed

IDX = Path("/usr/share/datasets/fashion-mnist")


def write_sites(idx: Path, out: Path, sites: int = 20, alpha: float = 0.5) -> Path:
    """Write ``site/class/00042.png``, 70,000 PNG files; what is there already is kept.

    Args:
        idx: folder of the idx files.
        out: where to.
        sites: how many; each class is spread over them in Dirichlet proportions.
        alpha: of these.

    Returns:
        ``out``.
    """
    from PIL import Image

    source = FashionMNIST(str(idx))
    source.prepare()
    labels = source.load().labels
    rng = np.random.default_rng(derive_seed("sites", sites))
    for label, name in enumerate(source.class_names):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet([alpha] * sites)) * len(rows)
        for site, part in enumerate(np.split(rows, cuts[:-1].astype(int))):
            folder = out / f"site_{site:02d}" / name.replace("/", " or ")
            if len(part):
                folder.mkdir(parents=True, exist_ok=True)
            for row in part.tolist():
                path = folder / f"{row:05d}.png"
                if not path.exists():
                    Image.fromarray(source.read([row])[0, 0].numpy()).save(path)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--idx", type=Path, default=IDX)
    parser.add_argument("--sites", type=int, default=20)
    options = parser.parse_args()
    print(write_sites(options.idx, options.out, options.sites))
