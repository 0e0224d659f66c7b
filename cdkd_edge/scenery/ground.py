"""The ground of a drawn scene: a material for every pixel, then its colour.

A material has one label; whatever is painted here is labelled exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cdkd_edge.scenery.plan import (
    BANK,
    EMPTY,
    FIELD,
    FLATS,
    HALLS,
    PARK,
    VILLAS,
    Axis,
    BoolArray,
    ByteArray,
    FloatArray,
    Plan,
    value_noise,
)

BUILDING, LAND, ROAD, VEGETATION, WATER = (np.uint8(label) for label in range(5))
"""Labels of the built-in schema ``dubai``."""

_SAND, _DIRT, _PAVING, _BEACH, _LAWN, _CROP, _SCRUB, _ASPHALT, _PAINT, _SEA, _FOAM = range(11)
_LABEL = np.array([LAND] * 4 + [VEGETATION] * 3 + [ROAD] * 2 + [WATER] * 2, np.uint8)
_COLOR = np.array(
    [
        *((189, 181, 170), (166, 152, 136), (166, 160, 154), (207, 198, 182)),
        *((78, 86, 62), (88, 98, 62), (96, 98, 80)),
        *((99, 94, 95), (205, 202, 196)),
        *((22, 32, 32), (150, 158, 152)),
    ],
    np.float32,
)
# How strongly fine texture and broad mottling show.
_TEXTURE = np.array((0.05, 0.10, 0.06, 0.03, 0.13, 0.10, 0.20, 0.035, 0.03, 0.10, 0.12), np.float32)
_MOTTLE = np.array((0.07, 0.10, 0.05, 0.03, 0.09, 0.05, 0.08, 0.04, 0.02, 0.10, 0.05), np.float32)
# The material of a block by its use: villas, flats, halls, site, park, field, empty, grove.
_BASE = np.array((_DIRT, _PAVING, _PAVING, _DIRT, _LAWN, _CROP, _SAND, _SAND), np.uint8)
_DEEP_WATER = np.array(((10, 14, 18), (16, 40, 26), (12, 40, 48)), np.float32)
_SHALLOWS = np.array((70, 95, 80), np.float32)


@dataclass(frozen=True)
class Picture:
    """A scene being drawn: ``image`` float32 ``[H, W, 3]`` on 0..255 and ``labels`` uint8 ``[H, W]``."""

    image: FloatArray
    labels: ByteArray


def paint_ground(plan: Plan, rng: np.random.Generator) -> Picture:
    """Paint everything that lies flat, without shadows."""
    mottle = value_noise(rng, plan.height, plan.width, 256, 4, 0.6)
    material = _choose_materials(plan, mottle)
    labels = _LABEL[material]
    return Picture(_color(plan, material, labels, mottle, rng), labels)


def _choose_materials(plan: Plan, mottle: FloatArray) -> ByteArray:
    """The material of every pixel; later lines paint over earlier ones."""
    use, edge, shore = plan.use, plan.edge, plan.shore
    material = _BASE[use]
    material[(use == VILLAS) & (mottle > 0.75)] = _LAWN
    material[(use == FLATS) & (mottle > 0.95)] = _LAWN
    material[(use == PARK) & (np.abs(mottle + 0.2) < 0.07)] = _PAVING  # footpaths along a contour
    material[(use == PARK) & (mottle < -1.35)] = _SAND
    material[(use == EMPTY) & (mottle > 1.45)] = _SCRUB
    material[(use == FIELD) & (edge < 12)] = _DIRT
    # Car parks beside the streets of flats and halls: label "road", as in the imagery.
    side, paved = plan.across_u.edge, (use == FLATS) | (use == HALLS)
    material[paved & (plan.across_u.off > 0) & (side > 6) & (side < 36) & (edge > 6)] = _ASPHALT
    material[edge < 6] = _PAVING

    road = edge < 0
    material[road] = _ASPHALT
    for axis, crossing in ((plan.across_u, plan.across_v), (plan.across_v, plan.across_u)):
        _mark_street(material, axis, road & (axis.edge < 0) & (crossing.edge > 12))

    middle = (np.abs(shore - (BANK + 8)) < 0.7) & (np.minimum(plan.across_u.edge, plan.across_v.edge) > 9)
    material[middle & (np.mod(plan.u + plan.v, 28) < 12)] = _PAINT
    bank = (shore < BANK) & ~road
    material[bank] = _SAND
    material[bank & (mottle > 1.1)] = _SCRUB
    material[bank & (shore < 14 + 5 * mottle)] = _BEACH
    sea = (shore < 0) & ~road
    material[sea] = _SEA
    material[sea & (shore > -2.5 - mottle)] = _FOAM
    return material


def _mark_street(material: ByteArray, axis: Axis, clear: BoolArray) -> None:
    """Green medians and edge lines on main roads, dashed lines between lanes; only on ``clear`` pixels."""
    rows, columns = np.nonzero(clear)
    offset, main = np.abs(axis.off[rows, columns]), axis.main[rows, columns]
    kerb, dashed = axis.edge[rows, columns], np.mod(axis.run[rows, columns], 22) < 9
    line = dashed & (np.abs(offset - np.where(main, np.float32(12), np.float32(0))) < 0.8)
    line |= main & ((np.abs(offset - 5.2) < 0.6) | (np.abs(kerb + 1.4) < 0.6))
    material[rows[line], columns[line]] = _PAINT
    median = main & (offset < 4)
    material[rows[median], columns[median]] = _LAWN


def _color(
    plan: Plan, material: ByteArray, labels: ByteArray, mottle: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """The colour of every pixel: its material's, varied by block, texture, crop rows and depth of water."""
    fine = value_noise(rng, plan.height, plan.width, 64, 2, 0.75)
    palette = _COLOR.copy()
    palette[:_LAWN] *= (rng.uniform(0.93, 1.12) * (1 + 0.03 * rng.standard_normal(3))).astype(np.float32)
    image: FloatArray = palette[material]

    gain = 1 + _TEXTURE[material] * fine + _MOTTLE[material] * mottle
    blocks = plan.uses.shape
    crops = np.nonzero(material == _CROP)
    block = plan.across_u.block[crops], plan.across_v.block[crops]
    angle, period = rng.uniform(0, np.pi, blocks), rng.uniform(6, 13, blocks)
    wave_u, wave_v = ((2 * np.pi * f(angle) / period).astype(np.float32)[block] for f in (np.cos, np.sin))
    rows_of_crop = 0.92 + 0.2 * np.sin(plan.u[crops] * wave_u + plan.v[crops] * wave_v)
    gain[crops] *= rows_of_crop * rng.uniform(0.75, 1.15, blocks).astype(np.float32)[block]
    image *= gain[..., None]

    tint = 1 + 0.07 * rng.standard_normal((*blocks, 1)) + 0.01 * rng.standard_normal((*blocks, 3))
    ground = np.nonzero((plan.edge > 6) & (plan.shore > BANK) & (material != _ASPHALT))
    image[ground] *= tint.astype(np.float32)[plan.across_u.block[ground], plan.across_v.block[ground]]
    image[..., 2] -= 3 * mottle * (labels == LAND)  # sand turns from grey to ochre

    sea = np.nonzero(material == _SEA)
    depth = np.maximum(-plan.shore[sea], 0)
    waves = 1 + 0.12 * fine[sea] + 0.1 * mottle[sea]
    shallow = np.exp(-depth / np.float32(rng.uniform(9, 26)))
    image[sea] = _DEEP_WATER[rng.integers(3)] * waves[:, None] + _SHALLOWS * shallow[:, None]
    image[(plan.shore > 0) & (plan.shore < 4) & (plan.edge >= 0)] *= 0.72  # wet sand
    return image
