"""The thought_attention op."""
