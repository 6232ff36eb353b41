"""The hyper_coefficients op."""
