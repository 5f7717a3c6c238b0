"""Run folders, checkpoints, and the description of a run's environment."""
