"""Calibration sets: tiles chosen from an archive so that INT8 ranges and checks see what the board will see."""
