"""The policy and its update: online reinforcement of a diffusion model by negative-aware fine-tuning."""
