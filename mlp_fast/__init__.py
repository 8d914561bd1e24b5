"""The character-level n-gram MLP of LLM101n, as fast as the hardware allows, to the same digits."""

import os
import sys

from mlp_fast.threads import after_fork

__version__ = "0.1.0"

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)

if sys.argv[:1] == ["-m"]:  # so for as long as Python looks for the module: `python -m mlp_fast.COMMAND` begins here
    from mlp_fast.startup import begin

    begin()
