// A launch that does nothing: what every other launch costs at least.
extern "C" __global__ void empty(const int* __restrict__, int*) {}
