"""The sparse_latent_attention op."""
