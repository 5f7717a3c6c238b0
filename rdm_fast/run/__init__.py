"""What a run leaves on disk: its folder, its checkpoints, and a description of its environment."""
