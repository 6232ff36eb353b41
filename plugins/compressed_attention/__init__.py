"""The compressed_attention op."""
