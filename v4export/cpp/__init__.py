"""Bundles for C++ programs: a CMake project that runs one, and what it has to know of it."""
