"""A layer's style as QGIS finds it inside a GeoPackage: a row of the table ``layer_styles``."""

from __future__ import annotations

from xml.etree import ElementTree

from cdkd_edge.labels import LabelSchema
from cdkd_edge.scene.style import qml


def style_row(layer: str, geometry: str, schema: LabelSchema, moment: str) -> dict[str, str | bool]:
    """The row by column name.

    Args:
        layer: its name.
        geometry: name of its geometry column.
        schema: class names and colours.
        moment: time of the last change, ISO 8601.
    """
    return {
        "f_table_catalog": "",
        "f_table_schema": "",
        "f_table_name": layer,
        "f_geometry_column": geometry,
        "styleName": "classes",
        "styleQML": style_qml(schema),
        "styleSLD": "",
        "useAsDefault": True,
        "description": "colours of the label schema",
        "owner": "",
        "ui": "",
        "update_time": moment,
    }


def style_qml(schema: LabelSchema) -> str:
    """A categorised fill by ``class_id``."""
    root = ElementTree.Element("qgis", version="3.22.0", styleCategories="Symbology")
    renderer = ElementTree.SubElement(
        root, "renderer-v2", type="categorizedSymbol", attr="class_id", enableorderby="0", forceraster="0"
    )
    categories = ElementTree.SubElement(renderer, "categories")
    symbols = ElementTree.SubElement(renderer, "symbols")
    for label, cls in enumerate(schema.classes):
        ElementTree.SubElement(
            categories, "category", value=str(label), type="integer", label=cls.name, symbol=str(label), render="true"
        )
        symbol = ElementTree.SubElement(symbols, "symbol", name=str(label), type="fill", alpha="1", clip_to_extent="1")
        fill = ElementTree.SubElement(symbol, "layer", {"class": "SimpleFill", "enabled": "1", "pass": "0"})
        red, green, blue = cls.color
        look = {
            "color": f"{red},{green},{blue},178",
            "style": "solid",
            "outline_color": f"{red * 3 // 5},{green * 3 // 5},{blue * 3 // 5},255",
            "outline_style": "solid",
            "outline_width": "0.1",
            "outline_width_unit": "MM",
        }
        options = ElementTree.SubElement(fill, "Option", type="Map")
        for name, value in look.items():
            ElementTree.SubElement(options, "Option", name=name, value=value, type="QString")
        for name, value in look.items():  # QGIS before 3.22
            ElementTree.SubElement(fill, "prop", k=name, v=value)
    return qml(root)
