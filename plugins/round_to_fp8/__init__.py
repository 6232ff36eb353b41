"""The round_to_fp8 op."""
