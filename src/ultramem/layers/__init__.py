"""Memory layers, each with its settings; the rows they read belong to a pool that the model owns."""

from typing import NamedTuple

from ultramem.layers.memory import AddOutput, MemoryConfig, MemoryLayer, MemoryOutput, Statistics, add_losses, draw_pool
from ultramem.layers.memory_plus import MemoryPlus, MemoryPlusConfig
from ultramem.layers.peer import PEER, PEERConfig
from ultramem.layers.pkm import PKM, PKMConfig
from ultramem.layers.placement import Span, parse_placement
from ultramem.layers.table import MemoryPool, RingWindow
from ultramem.layers.ultramem import UltraMem, UltraMemLayerConfig
from ultramem.layers.ultramem_v2 import UltraMemV2, UltraMemV2Config


class MemoryType(NamedTuple):
    """A kind of memory: its settings and its layer."""

    config: type[MemoryConfig]
    layer: type[MemoryLayer]


MEMORY_TYPES: dict[str, MemoryType] = {
    "ultramem_v2": MemoryType(UltraMemV2Config, UltraMemV2),
    "ultramem": MemoryType(UltraMemLayerConfig, UltraMem),
    "memory_plus": MemoryType(MemoryPlusConfig, MemoryPlus),
    "pkm": MemoryType(PKMConfig, PKM),
    "peer": MemoryType(PEERConfig, PEER),
}


__all__ = [
    "MEMORY_TYPES",
    "PEER",
    "PKM",
    "AddOutput",
    "MemoryConfig",
    "MemoryLayer",
    "MemoryOutput",
    "MemoryPlus",
    "MemoryPlusConfig",
    "MemoryPool",
    "PEERConfig",
    "PKMConfig",
    "RingWindow",
    "Span",
    "Statistics",
    "UltraMem",
    "UltraMemLayerConfig",
    "UltraMemV2",
    "UltraMemV2Config",
    "add_losses",
    "draw_pool",
    "parse_placement",
]
