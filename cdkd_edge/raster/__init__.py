"""Rasters and what is known of them: reading, stretching, resampling, grids, areas, styles."""
