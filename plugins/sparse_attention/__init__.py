"""The sparse_attention op."""
