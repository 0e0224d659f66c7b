"""How fast a graph could be on a device."""
