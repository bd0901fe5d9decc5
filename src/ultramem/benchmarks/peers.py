"""Other people's memory layers, from PyPI, built at the sizes of ours."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from ultramem.errors import PeerError


@dataclass(frozen=True)
class Peer:
    """A package with a layer that ours is compared with.

    Attributes:
        package: its name on PyPI.
        module: what is imported.
        layer: the class of the layer.
    """

    package: str
    module: str
    layer: str


PEERS = {
    "ultra-mem": Peer("ultra-mem", "ultra_mem", "UltraMem"),
    "PEER-pytorch": Peer("PEER-pytorch", "PEER_pytorch", "PEER"),
    "product-key-memory": Peer("product-key-memory", "product_key_memory", "PKM"),
}


def load_peer(name: str) -> Any:
    """The class of a peer's layer.

    Args:
        name: one of `PEERS`.

    Raises:
        PeerError: the package, or one that it needs, is not installed or does not load; gives the pip line.
    """
    peer = PEERS[name]
    try:
        return getattr(import_module(peer.module), peer.layer)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        what = "is not installed" if missing == peer.module else f"needs {missing}, which is not installed"
        raise PeerError(f"{peer.package} {what}: pip install 'ultramem[bench]'") from error
    except (ImportError, AttributeError) as error:
        raise PeerError(
            f"{peer.package} is installed but does not load ({error}): pip install --upgrade 'ultramem[bench]'"
        ) from error


def ultra_mem_layer(hidden_size: int, num_keys: int, key_dim: int, value_dim: int, top_k: int, cores: int) -> nn.Module:
    """`ultra_mem.UltraMem` without what ours has not: prenorm, convolution, value expansion.

    It has no pre-values, one query for both sides, and searches once per core, each in a table of its own of
    ``value_dim / cores`` columns.
    """
    kind = load_peer("ultra-mem")
    layer: nn.Module = kind(
        hidden_size,
        dim_values=value_dim // cores,
        num_memories=num_keys**2,
        topk=top_k,
        dim_queries_keys=key_dim,
        core_rank=2,
        core_heads=cores,
        value_expansion=1,
        pre_query_causal_conv=False,
        prenorm=False,
    )
    return layer


def peer_layer(hidden_size: int, num_keys: int, key_dim: int, num_heads: int, top_k: int) -> nn.Module:
    """`PEER_pytorch.PEER` with softmax over each head's experts."""
    kind = load_peer("PEER-pytorch")
    layer: nn.Module = kind(
        hidden_size,
        heads=num_heads,
        num_experts=num_keys**2,
        num_experts_per_head=top_k,
        dim_key=key_dim,
        non_competing_scores=False,
    )
    return layer


def product_key_layer(hidden_size: int, num_keys: int, key_dim: int, num_heads: int, top_k: int) -> nn.Module:
    """`product_key_memory.PKM`; its queries are layer-normed over each head's half."""
    kind = load_peer("product-key-memory")
    layer: nn.Module = kind(hidden_size, heads=num_heads, num_keys=num_keys, topk=top_k, dim_head=key_dim)
    return layer
