"""What every training here stands on: recipes, run folders, processes, addressed randomness, checkpoints, tracking."""
