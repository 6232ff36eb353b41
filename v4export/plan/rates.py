"""What the stages of a build were measured to take: the constants that predictions of time and memory are made of.

Measured on a virtual machine of two cores that others use as well, so a time may be a third of what is predicted, or
three times that. Bytes of weights and of state are not reckoned by rates: they are exact.
"""

from __future__ import annotations

MIB = 1 << 20

#: Resident once everything is imported that a build needs.
BASE_BYTES = 400 * MIB
#: What tracing leaves behind: of the first part, with PyTorch's exporter, and of each.
FIRST_TRACE_BYTES, TRACE_BYTES = 70 * MIB, 5 * MIB
#: What a tensor costs while graphs are made: DeepSeek-V4-Flash's 67,612 took 1.1 GB, V4.1-Flash's 93,374 1.5 GB.
TENSOR_BYTES = 10 << 10
#: Of a graph's file: a tensor, with its name, shape and place; in the copy for a CPU, with the nodes of an expert, too;
#: and everything else of a layer.
GRAPH_TENSOR_BYTES, CPU_TENSOR_BYTES, GRAPH_LAYER_BYTES = 250, 1000, 60 << 10
#: Copies of a window of rows, in float32, while a matrix is converted.
WINDOW_COPIES, WINDOW_ROWS = 6, 1024

#: Bytes a second that the scan for NaN reads: 3.9 GB in 5 s (docs/benchmarks.md, at real widths).
SCAN = 0.8e9
#: Seconds that the first part takes to trace, and each part; a step of a thought is one for each of its layers.
FIRST_TRACE_S, TRACE_S = 3.0, 0.9
#: Numbers a second that are converted, by the format they become (benchmarks/plan_rates.py, on a machine
#: that did other work, too); bf16 and int64, which it does not measure, as fp16.
NUMBERS = {
    "fp32": 47e6,
    "fp16": 98e6,
    "bf16": 98e6,
    "fp8": 55e6,
    "fp8-row": 28e6,
    "mxfp8": 30e6,
    "mxfp4": 38e6,
    "nvfp4": 4.3e6,
    "int8": 54e6,
    "int4": 14e6,
    "int64": 98e6,
}
#: Bytes a second of multipliers written anew: 16 GiB in 62 s, 32 GiB in 102 s (docs/benchmarks.md).
MULTIPLIERS = 0.28e9
#: Seconds a tensor and graph: names, shapes and places read and written.
GRAPH_TENSOR_S = 0.3e-3
#: Bytes a second written once more for a CPU.
REPACK = 0.15e9
#: What verifying takes beside weights, and how often the largest layer is there in float32.
VERIFY_BYTES, VERIFY_COPIES = 100 * MIB, 3
#: Times that the bodies of ops hold all experts in float32 while a graph is loaded: stacked; and widened from blocks.
BODIES_PLAIN, BODIES_NARROW = 2, 6
#: Seconds that this takes, a number of an expert.
BODIES_S = 100e-9
#: Tokens of all prompts that are verified, and of what is decoded after them.
VERIFY_TOKENS = 800
#: Seconds for each number of a weight, which is made once more for the reference; for 1e9 operations of the tokens; and
#: for a layer: 358 s for 3.8e9 numbers, 1.3e9 of them at work (docs/benchmarks.md, at real widths).
VERIFY_NUMBER_S, VERIFY_GFLOP_S, VERIFY_LAYER_S = 30e-9, 0.12, 1.2
#: Bytes of weights a second that an engine is built of: 4.05 GB in 54 s (docs/benchmarks.md, at real widths).
ENGINE = 75e6
#: Seconds and bytes of an engine for each layer of the model: kernels, tactics, both profiles.
ENGINE_LAYER_S, ENGINE_LAYER_BYTES = 0.8, 4 * MIB
#: Of an engine, over the bytes of its weights: at most 2,145 MiB for 2,011 (docs/benchmarks.md, size of recipes).
ENGINE_OVER_WEIGHTS = 1.07
#: Anonymous memory of the process that builds, over the bytes of weights: between these.
ENGINE_MEMORY_LEAST, ENGINE_MEMORY = 1.1, 1.8
#: Of a GPU, what CUDA's context and libraries take.
CONTEXT_BYTES = 600 * MIB
