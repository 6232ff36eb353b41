"""The index_reselect op."""
