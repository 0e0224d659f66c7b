"""The board: what it is, its power, its conditions during a measurement, its power mode and clocks, and the doctor."""
