"""The cross-layer transcoder itself, in both modes."""
