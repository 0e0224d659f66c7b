"""cdkd-edge: a land-cover segmentation network, from a checkpoint to a measured engine."""

__version__ = "0.1.0"
