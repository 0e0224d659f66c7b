"""Many scenes, in one or several processes or on the workers of a scheduler."""
