"""What a run costs: its plan, its communication, and benchmarks."""
