"""Pages to look at a trained CLT: its latents, its connections, the figures of its run."""
