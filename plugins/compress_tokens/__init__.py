"""The compress_tokens op."""
