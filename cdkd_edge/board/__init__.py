"""The board: what it is, what it does while something is measured, and changing its mode and clocks for a run."""
