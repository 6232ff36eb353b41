"""The int4_dequantize op."""
