"""Many scenes: in this process, in several processes, or on the workers of a scheduler."""
