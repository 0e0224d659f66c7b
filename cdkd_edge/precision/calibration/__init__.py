"""Chooses tiles of scenes for calibration sets: scan, choose, write; :mod:`.calibrate` runs these steps."""
