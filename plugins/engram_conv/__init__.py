"""The engram_conv op."""
