// A stand-in for CUDA's header, for machines without CUDA: the one name that TensorRT's headers take from it.
#pragma once

typedef struct CUstream_st* cudaStream_t;
