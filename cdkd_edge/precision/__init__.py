"""What `build` makes: which graph, for which runtime; INT8 and its gate; calibration tiles."""
