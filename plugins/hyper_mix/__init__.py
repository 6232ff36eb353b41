"""The hyper_mix op."""
