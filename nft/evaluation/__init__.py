"""What came out of runs: comparisons, summaries, and pictures."""
