"""Scales by which inputs are rounded to FP8, found by running text through the float32 definition."""
