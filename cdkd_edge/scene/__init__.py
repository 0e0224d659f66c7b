"""From a raster to a label map, in bounded memory."""
