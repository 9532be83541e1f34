"""What latents do on text: one pass that gathers their firings, and what is shown of them."""
