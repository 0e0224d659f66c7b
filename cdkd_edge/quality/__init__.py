"""Measures how good labels are: datasets, masks, metrics, evaluation, parity."""
