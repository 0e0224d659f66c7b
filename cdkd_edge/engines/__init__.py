"""Engines: uint8 tiles in, uint8 labels out, whatever runs them."""
