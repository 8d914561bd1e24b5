"""From a text to tapes of tokens."""
