"""Masked-diffusion language models, as `transformers` models of our own (no remote code)."""
