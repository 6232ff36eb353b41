"""The all_reduce op."""
