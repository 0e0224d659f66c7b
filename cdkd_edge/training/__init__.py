"""Trains decoders on labelled images: training data, cached features, training loop, model card (torch)."""
