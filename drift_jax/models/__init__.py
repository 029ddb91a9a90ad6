"""Qwen in Flax NNX, its attention and cache, token log-probabilities, Hugging Face import and export."""
