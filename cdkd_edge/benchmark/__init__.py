"""Benchmark runs: measured, recorded, shown and compared."""
