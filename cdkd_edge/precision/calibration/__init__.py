"""Choosing the tiles that set INT8 ranges."""
