"""A dataset for the bundled network: labelled imagery beside drawn scenery, as one folder pair.

    python export/recipes/tiny/data.py DATA FOLDER

DATA holds the Dubai scenes (``images/``, ``masks/``); FOLDER gets links to them, and drawn scenes whose labels are
exact. The demo labels a drawn scene, so the network has to know what drawings look like as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from scenery import draw_scene

from cdkd_edge.core.labels import Palette, load_schema
from cdkd_edge.quality.datasets import find_dataset

SIDE = 1024
TRAINING_SEEDS = range(1000, 1028)
HELD_OUT_SEEDS = range(100, 108)


def draw_into(folder: Path, seeds: range) -> None:
    """Write one drawn scene per seed, image and mask in the schema's colours."""
    palette = load_schema("dubai").in_palette(Palette.DATASET).palette()
    for seed in seeds:
        scene = draw_scene(SIDE, SIDE, seed=seed)
        Image.fromarray(scene.image).save(folder / "images" / f"drawn{seed}.png")
        Image.fromarray(palette[scene.labels]).save(folder / "masks" / f"drawn{seed}.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder with the Dubai images/ and masks/")
    parser.add_argument("folder", type=Path, help="new folder")
    options = parser.parse_args()
    training, held_out = options.folder / "training", options.folder / "drawn"
    for folder in (training, held_out):
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
    for pair in find_dataset(options.data):
        (training / "images" / pair.image.name).symlink_to(pair.image.resolve())
        (training / "masks" / pair.mask.name).symlink_to(pair.mask.resolve())
    draw_into(training, TRAINING_SEEDS)
    draw_into(held_out, HELD_OUT_SEEDS)


if __name__ == "__main__":
    main()
