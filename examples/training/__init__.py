"""A small DeepSeek-V3-like model that can be trained, its data, and its checkpoint."""
