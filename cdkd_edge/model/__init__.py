"""The network, its checkpoints and its cost. Only :mod:`cdkd_edge.model.config` works without torch."""
