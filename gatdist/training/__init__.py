"""Training: state, step, loop, checkpoints, health."""
