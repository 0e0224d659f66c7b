"""Segments scenes: from a raster and an engine to a label map, its products, and many scenes at once."""
