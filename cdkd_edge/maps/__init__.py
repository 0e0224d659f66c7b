"""What is made from a finished label map: areas, polygons, a picture, a catalogue entry."""
