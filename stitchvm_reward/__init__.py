"""Rewards for diffusion models: of images and, stitched, of noisy latents."""
