"""The style with which QGIS opens a label map: ``<name>.qml`` beside it.

The palette inside a GeoTIFF always has 256 colours (TIFF 6.0, section 5), and QGIS lists them all, the classes
first and then one black entry for every number that is none. A style of this name it takes by itself.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from cdkd_edge.labels import LabelSchema
from cdkd_edge.scene.pam import xml_text

_MARK = "cdkd-edge"
"""In styles that were written here. QGIS drops the element when somebody saves a style of their own."""


def style_path(label_map: Path) -> Path:
    """Where QGIS looks for the style of a raster."""
    return label_map.with_suffix(".qml")


def label_map_style(schema: LabelSchema) -> str:
    """The text of ``<name>.qml``: the classes with their names and colours, and nothing for no label."""
    root = ElementTree.Element("qgis", version="3.22.0", styleCategories="Symbology", made=_MARK)
    renderer = ElementTree.SubElement(
        ElementTree.SubElement(root, "pipe"),
        "rasterrenderer",
        type="paletted",
        band="1",
        opacity="1",
        alphaBand="-1",
        nodataColor="",
    )
    palette = ElementTree.SubElement(renderer, "colorPalette")
    for label, cls in enumerate(schema.classes):
        color = "#{:02x}{:02x}{:02x}".format(*cls.color)
        ElementTree.SubElement(palette, "paletteEntry", value=str(label), label=cls.name, color=color, alpha="255")
    return qml(root)


def qml(root: ElementTree.Element) -> str:
    """The text of a style."""
    return "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n" + xml_text(root)


def is_somebodys_own(style: Path, schema: LabelSchema) -> bool:
    """Whether somebody saved this style, which is theirs to keep, unless it is for other classes and would mislead.

    A link is somebody's; an empty file, or a part of a style that was written here, is nobody's.
    """
    if style.is_symlink() or not style.is_file():
        return style.is_symlink() or style.exists()
    try:
        text = style.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return True
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return bool(text.strip()) and f'made="{_MARK}"' not in text
    named = {entry.get("value"): entry.get("label") for entry in root.iter("paletteEntry")}
    classes = {str(label): name for label, name in enumerate(schema.class_names)}
    return root.get("made") != _MARK and (not named or classes.items() <= named.items())
