"""Files: checkpoints that survive a crash, and safetensors in a stream."""
