"""Where watts come from. What cannot be measured is absent, with the reason."""
