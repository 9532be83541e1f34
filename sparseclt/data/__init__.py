"""Text, tokens and activations for training."""
