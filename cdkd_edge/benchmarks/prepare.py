"""Before a measurement: room on the disk for what it will write, and tiles in the engine's slots."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from cdkd_edge.benchmarks.record import Protocol
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.scenery import draw_scene

RESERVED = ".reserved"
"""The file that takes the room."""


def reserve_room(folder: Path, protocol: Protocol) -> None:
    """Take the room that the tables will need now, so that a disk that fills up meanwhile costs no measurement.

    Raises:
        OSError: there is not so much.
    """
    seconds = protocol.repeats * (protocol.load_seconds + protocol.warm_up_cap_seconds + protocol.idle_seconds)
    # 40 readings of 60 bytes and 30 tiles of 40 bytes a second, the pictures and the page.
    size = int(4e6 + seconds * 4000)
    with open(folder / RESERVED, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            error.filename = f"{size / 1e6:.0f} MB in {folder.parent}"
            raise


def fill_inputs(engine: Engine) -> None:
    """Different drawn tiles in every slot, so that no cache sees the same image twice in a row."""
    tile, batch = engine.manifest.tile, engine.manifest.batch
    scene = draw_scene(tile, tile, seed=3).image.transpose(2, 0, 1)
    for slot in range(engine.slots):
        for index in range(batch):
            shift = (slot * batch + index) * 37 % tile
            engine.input(slot)[index] = np.roll(scene, (shift, shift), (1, 2))
