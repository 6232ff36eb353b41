"""CUDA kernels of the custom ops: how they are declared, compiled, run on a CPU or a GPU, and given to TensorRT."""
