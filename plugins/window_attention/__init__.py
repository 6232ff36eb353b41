"""The window_attention op."""
