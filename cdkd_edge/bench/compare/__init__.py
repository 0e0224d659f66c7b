"""Benchmark runs beside each other."""
