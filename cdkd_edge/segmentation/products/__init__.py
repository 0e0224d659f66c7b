"""What is made beside a label map: polygons, a preview, a STAC Item (:mod:`.write` makes them)."""
