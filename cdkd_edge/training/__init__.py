"""Decoder tuning on labelled images: views, remembered features, the training loop, the card (torch)."""
