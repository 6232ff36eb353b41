"""The engram_gating op."""
