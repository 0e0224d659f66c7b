"""Trains a student on the features of a frozen teacher, on tiles without labels (torch)."""
