"""A roofline of a graph on a device: what its operators cost, and how fast they could be. Modelled, never measured."""
