"""Training on a desktop: crops of labelled imagery and the bundled demonstration checkpoint (torch)."""
