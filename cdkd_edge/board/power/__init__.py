"""Power sources, sampled in a process of their own, and joules from the samples."""
