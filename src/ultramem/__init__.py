"""Language models whose capacity sits in large, sparsely read memory tables.

Importing this package registers the model with transformers' Auto classes.
"""

from ultramem.layers import MemoryPool, UltraMemV2, UltraMemV2Config
from ultramem.model import UltraMemConfig, UltraMemForCausalLM, UltraMemModel

__version__ = "0.1.0"

__all__ = [
    "MemoryPool",
    "UltraMemConfig",
    "UltraMemForCausalLM",
    "UltraMemModel",
    "UltraMemV2",
    "UltraMemV2Config",
    "__version__",
]
