"""The character-level n-gram MLP of LLM101n, as fast as the hardware allows, to the same digits."""

__version__ = "0.1.0"
