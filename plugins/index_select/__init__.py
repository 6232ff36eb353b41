"""The index_select op."""
