"""Stitched value models: a diffusion backbone's first blocks, a small layer, and a reward model's last blocks."""
