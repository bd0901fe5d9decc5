"""Memory layers, each with its settings; the rows they read belong to a pool that the model owns."""

from typing import NamedTuple

from ultramem.layers.placement import Span, parse_placement
from ultramem.layers.table import MemoryPool, RingWindow
from ultramem.layers.ultramem_v2 import MemoryOutput, UltraMemV2, table_std
from ultramem.layers.ultramem_v2_config import UltraMemV2Config


class MemoryType(NamedTuple):
    """A kind of memory: its settings and its layer."""

    config: type[UltraMemV2Config]
    layer: type[UltraMemV2]


MEMORY_TYPES: dict[str, MemoryType] = {"ultramem_v2": MemoryType(UltraMemV2Config, UltraMemV2)}


__all__ = [
    "MEMORY_TYPES",
    "MemoryOutput",
    "MemoryPool",
    "RingWindow",
    "Span",
    "UltraMemV2",
    "UltraMemV2Config",
    "parse_placement",
    "table_std",
]
