"""Many scenes through one engine, or through the engines of many workers."""
