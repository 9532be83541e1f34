"""The graph of one prompt: which latents caused which, exactly, in sparsely-connected mode."""
