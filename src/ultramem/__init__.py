"""Language models whose capacity sits in large, sparsely read memory tables.

Importing this package registers the model with transformers' Auto classes.
"""

from ultramem.layers import (
    PEER,
    PKM,
    MemoryPlus,
    MemoryPlusConfig,
    MemoryPool,
    PEERConfig,
    PKMConfig,
    UltraMem,
    UltraMemLayerConfig,
    UltraMemV2,
    UltraMemV2Config,
)
from ultramem.model import UltraMemConfig, UltraMemForCausalLM, UltraMemModel
from ultramem.model.attach import MemoryAdapter, attach, detach, load_adapter

__version__ = "0.1.0"

__all__ = [
    "PEER",
    "PKM",
    "MemoryAdapter",
    "MemoryPlus",
    "MemoryPlusConfig",
    "MemoryPool",
    "PEERConfig",
    "PKMConfig",
    "UltraMem",
    "UltraMemConfig",
    "UltraMemForCausalLM",
    "UltraMemLayerConfig",
    "UltraMemModel",
    "UltraMemV2",
    "UltraMemV2Config",
    "__version__",
    "attach",
    "detach",
    "load_adapter",
]
