"""What a label map gets beside it: polygons, a preview, a STAC Item."""
