"""Numbers as E4M3 and back, as standard nodes that TensorRT takes."""
