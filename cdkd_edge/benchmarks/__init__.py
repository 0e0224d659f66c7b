"""Speed and power, measured and written down with everything needed to repeat them."""
