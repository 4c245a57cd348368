"""Official checkpoints to ours and back: one module for each system, with no knowledge of files."""
