"""The INT8 graph: calibration tiles, ranges, and where it quantises."""
