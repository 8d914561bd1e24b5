"""The character-level n-gram MLP of LLM101n, as fast as the hardware allows, to the same digits."""

import os

from mlp_fast.threads import after_fork

__version__ = "0.1.0"

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)
