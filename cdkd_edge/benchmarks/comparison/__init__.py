"""Runs beside one another: ratios with intervals, what forbids a comparison, gates, a Pareto picture."""
