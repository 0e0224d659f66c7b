"""Sources of power, sampled in a process of their own, and joules from them."""
