"""The hyper_connection op."""
