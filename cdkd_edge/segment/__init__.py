"""A scene through an engine to a label map."""
