"""A run as one HTML file: text, tables and drawings, with nothing to fetch."""
