"""What works here, and what to do where it does not."""
