"""Which upstream latents each latent reads: statistics of latents, selection, and training policies."""
