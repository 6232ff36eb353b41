"""Runs a bundle's TensorRT engines where their state lies: on the device."""
