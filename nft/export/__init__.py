"""A run's result as files that people use."""
