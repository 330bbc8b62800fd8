"""Steering at inference: a frozen generator made to sample what a reward or a stitched value model likes."""
