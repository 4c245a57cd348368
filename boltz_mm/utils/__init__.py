"""Small helpers that import nothing else of the package: checkpoints, files, version shims."""
