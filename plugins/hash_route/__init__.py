"""The hash_route op."""
