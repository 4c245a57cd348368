"""Official checkpoints to ours."""
