"""Serving bundles: many requests at a time over one executor, and a model repository for Triton Inference Server."""
