"""What every room needs: errors, files, labels, manifests, the workspace, this machine."""
