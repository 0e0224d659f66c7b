"""The files beside a label map that name its classes: ``<file>.aux.xml`` for GDAL, ``<name>.qml`` for QGIS.

The sidecar holds class names and an attribute table (https://gdal.org/en/stable/drivers/raster/pamdataset.html), which
QGIS shows as classes with names and colours. The style is for QGIS alone, which finds it by its name: the palette of a
GeoTIFF always has 256 colours (TIFF 6.0, section 5), and QGIS would list a black entry for every unused number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from cdkd_edge.core.labels import LabelSchema

_INTEGER, _REAL, _STRING = "0", "1", "2"  # GDALRATFieldType
_GENERIC, _PIXEL_COUNT, _NAME, _VALUE, _RED, _GREEN, _BLUE = "0", "1", "2", "5", "6", "7", "8"  # GDALRATFieldUsage


@dataclass(frozen=True)
class ClassArea:
    """The part of a label map that one class covers."""

    label: int
    name: str
    pixels: int
    hectares: float | None  # None if unknown, see :attr:`.areas.Areas.reason`


def sidecar_path(label_map: Path) -> Path:
    """The file in which GDAL keeps what a raster's own format does not hold."""
    return label_map.with_name(label_map.name + ".aux.xml")


def describes(sidecar: Path, schema: LabelSchema, areas: Sequence[ClassArea]) -> bool:
    """Whether a sidecar belongs to a label map: its class names, and its pixels if it has them, are those of the map.

    GDAL and QGIS may have added statistics, and users columns.
    """
    try:
        root = ElementTree.fromstring(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, ElementTree.ParseError):
        return False
    names = [one.text or "" for one in root.iterfind("PAMRasterBand/CategoryNames/Category")]
    table = root.find("PAMRasterBand/GDALRasterAttributeTable")
    if table is None or names != list(schema.class_names):
        return False
    columns = [one.text for one in table.iterfind("FieldDefn/Name")]
    if "Pixels" not in columns:
        return True
    pixels = [row.findtext(f"F[{columns.index('Pixels') + 1}]") for row in table.iterfind("Row")]
    return pixels == [str(area.pixels) for area in areas]


def label_map_xml(schema: LabelSchema, areas: Sequence[ClassArea] = (), *, extra: str | None = None) -> str:
    """The text of ``<file>.aux.xml``: category names and a thematic attribute table, one row per class.

    Args:
        schema: class names and colours.
        areas: pixels and hectares of every class, in schema order, as columns of the table.
        extra: the sidecar that GDAL itself wrote (for an unusual CRS), which is kept.
    """
    root = Element("PAMDataset")
    if extra is not None:
        root.extend(item for item in ElementTree.fromstring(extra) if item.tag != "PAMRasterBand")
    band = SubElement(root, "PAMRasterBand", band="1")
    categories = SubElement(band, "CategoryNames")
    for name in schema.class_names:
        SubElement(categories, "Category").text = name
    table = SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    red, green, blue = zip(*(cls.shown for cls in schema.classes), strict=True)
    columns: list[tuple[str, str, str, Sequence[object]]] = [
        ("Value", _INTEGER, _VALUE, range(len(schema))),
        ("Class", _STRING, _NAME, schema.class_names),
        ("Red", _INTEGER, _RED, red),
        ("Green", _INTEGER, _GREEN, green),
        ("Blue", _INTEGER, _BLUE, blue),
    ]
    if areas:  # real numbers: GDAL keeps integers in 32 bits, and a scene may have more pixels of a class
        columns.append(("Pixels", _REAL, _PIXEL_COUNT, [area.pixels for area in areas]))
        if all(area.hectares is not None for area in areas):
            columns.append(("Area_ha", _REAL, _GENERIC, [area.hectares for area in areas]))
    for index, (name, kind, usage, _) in enumerate(columns):
        definition = SubElement(table, "FieldDefn", index=str(index))
        for tag, value in (("Name", name), ("Type", kind), ("Usage", usage)):
            SubElement(definition, tag).text = value
    for label in range(len(schema)):
        row = SubElement(table, "Row", index=str(label))
        for *_, values in columns:
            SubElement(row, "F").text = str(values[label])
    return xml_text(root)


# Characters that XML 1.0 (section 2.2) cannot hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def xml_text(root: Element) -> str:
    """A document as text; characters that XML cannot hold become U+FFFD."""
    for element in root.iter():
        element.text, element.tail = (part and _NOT_XML.sub("\ufffd", part) for part in (element.text, element.tail))
        element.attrib = {name: _NOT_XML.sub("\ufffd", value) for name, value in element.attrib.items()}
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


_MARK = "cdkd-edge"  # marks styles that were written here; QGIS drops the mark when a user saves a style


def style_path(label_map: Path) -> Path:
    """The file in which QGIS looks for the style of a raster."""
    return label_map.with_suffix(".qml")


def label_map_style(schema: LabelSchema) -> str:
    """The text of ``<name>.qml``: the classes with their names and colours, and nothing for no label."""
    root = Element("qgis", version="3.22.0", styleCategories="Symbology", made=_MARK)
    look = {"type": "paletted", "band": "1", "opacity": "1", "alphaBand": "-1", "nodataColor": ""}
    palette = SubElement(SubElement(SubElement(root, "pipe"), "rasterrenderer", look), "colorPalette")
    for label, cls in enumerate(schema.classes):
        color = "#{:02x}{:02x}{:02x}".format(*cls.shown)
        SubElement(palette, "paletteEntry", value=str(label), label=cls.name, color=color, alpha="255")
    return _qml(root)


def polygon_style(schema: LabelSchema) -> str:
    """The text of a style for polygons: the fill follows the field ``class_id``."""
    root = Element("qgis", version="3.22.0", styleCategories="Symbology")
    look = {"type": "categorizedSymbol", "attr": "class_id", "enableorderby": "0", "forceraster": "0"}
    renderer = SubElement(root, "renderer-v2", look)
    categories, symbols = SubElement(renderer, "categories"), SubElement(renderer, "symbols")
    for label, cls in enumerate(schema.classes):
        number = str(label)
        SubElement(categories, "category", value=number, type="integer", label=cls.name, symbol=number, render="true")
        symbol = SubElement(symbols, "symbol", name=number, type="fill", alpha="1", clip_to_extent="1")
        fill = SubElement(symbol, "layer", {"class": "SimpleFill", "enabled": "1", "pass": "0"})
        red, green, blue = cls.shown
        look = {
            "color": f"{red},{green},{blue},178",
            "style": "solid",
            "outline_color": f"{red * 3 // 5},{green * 3 // 5},{blue * 3 // 5},255",
            "outline_style": "solid",
            "outline_width": "0.1",
            "outline_width_unit": "MM",
        }
        options = SubElement(fill, "Option", type="Map")
        for name, value in look.items():
            SubElement(options, "Option", name=name, value=value, type="QString")
        for name, value in look.items():  # QGIS before 3.22
            SubElement(fill, "prop", k=name, v=value)
    return _qml(root)


def _qml(root: Element) -> str:
    return "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n" + xml_text(root)


def is_users_style(style: Path, schema: LabelSchema) -> bool:
    """Whether a user saved this style for these classes, so that it must be kept.

    A link, or an unreadable file, counts as the user's; an empty file, or part of a style written here, does not.
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
