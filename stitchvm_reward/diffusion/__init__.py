"""Paths, solvers and the generator."""
