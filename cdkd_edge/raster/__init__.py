"""Reads rasters: opening, bands, stretching, resampling, grids of tiles, areas, and the files beside label maps."""
