"""The whole chain in two minutes, with a bundled checkpoint and a drawn scene."""
