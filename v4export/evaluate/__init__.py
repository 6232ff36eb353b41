"""What recipes cost in quality: perplexity, divergence from float32, and the error of every layer."""
