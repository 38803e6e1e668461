"""Checkpoints on disk: weights in safetensors or GGUF, and tokenizer files, in and out."""

from srrl_jax.checkpoints.loading import load_model, read_config
from srrl_jax.checkpoints.saving import save_model
from srrl_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_model", "load_tokenizer", "read_config", "save_model"]
