"""`ultramem bench layer`: whole memory layers, ours on each backend beside those of other projects."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ultramem.benchmarks.cases import Builders, Case, measure_case
from ultramem.benchmarks.compiling import compiled
from ultramem.benchmarks.measure import Competitor, Tick
from ultramem.benchmarks.peers import PEERS, peer_layer, product_key_layer, ultra_mem_layer
from ultramem.benchmarks.plain_layer import plain_ultramem_v2
from ultramem.benchmarks.targets import OURS, PLAIN, REFERENCE, ROWS, ULTRA_MEM
from ultramem.layers import PEER, PKM, MemoryLayer, MemoryPool, PEERConfig, PKMConfig, UltraMemV2, UltraMemV2Config
from ultramem.ops import Activation, bag_reference, gather_dot_reference, use_backend

COMPILED = "torch.compile of the reference path"
PASSES = ("forward", "forward + backward")

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of the layers; the defaults are those of the project's targets.

    Attributes:
        hidden_size: D.
        num_keys: n of UltraMemV2, 262,144 rows.
        key_dim: kd.
        value_dim: V = U.
        top_k: k.
        num_cores: h; the rank is 2.
        num_tokens: N.
        product_keys: n of PKM and PEER.
        product_heads: H of PKM and PEER.
        product_tokens: N of PKM and PEER, whose rows are as wide as the model.
    """

    hidden_size: int = 512
    num_keys: int = 512
    key_dim: int = 128
    value_dim: int = 128
    top_k: int = 32
    num_cores: int = 2
    num_tokens: int = 2048
    product_keys: int = 256
    product_heads: int = 4
    product_tokens: int = 512


def run_layers(sizes: LayerSizes, num_runs: int, use_compile: bool = True, tick: Tick | None = None) -> list[Case]:
    """Measure all cases.

    Args:
        sizes: of the layers.
        num_runs: runs that count.
        use_compile: measure `torch.compile` too.
        tick: called after each run with what was run.
    """
    measure = partial(measure_case, num_runs=num_runs, tick=tick, at_target_sizes=sizes == LayerSizes())
    cases = []
    words = (
        f"UltraMemV2, D = {sizes.hidden_size}, n = {sizes.num_keys}, kd = {sizes.key_dim}, V = U = {sizes.value_dim}, "
        f"k = {sizes.top_k}, r = 2, h = {sizes.num_cores}, {sizes.num_tokens:,} tokens, fp32"
    )
    for kind, backward in zip(PASSES, (False, True), strict=True):
        cases.append(measure(kind, words, _ultramem_v2(sizes, backward, use_compile), num_tokens=sizes.num_tokens))
    words = (
        f"D = {sizes.hidden_size}, n = {sizes.product_keys}, {sizes.product_heads} heads, k = {sizes.top_k}, "
        f"kd = {sizes.key_dim}, {sizes.product_tokens:,} tokens, fp32"
    )
    for name, build in (("PEER", _peer), ("PKM", _pkm)):
        for kind, backward in zip(PASSES, (False, True), strict=True):
            cases.append(measure(f"{name} {kind}", words, build(sizes, backward), num_tokens=sizes.product_tokens))
    return cases


class _PlainPool(MemoryPool):
    """A pool whose lookups are plain PyTorch, into which a compiler can see."""

    def read(
        self,
        rows_NK: Tensor,
        scores: Tensor,
        x_NU: Tensor | None = None,
        activation: Activation | None = None,
        block_NK: Tensor | None = None,
        num_blocks: int = 1,
    ) -> Tensor:
        """As `MemoryPool.read`, for linear pre-values."""
        assert x_NU is not None
        assert self.pre_values is not None
        assert activation is None
        weights_NKC = scores * gather_dot_reference(rows_NK, x_NU, self.pre_values)
        return bag_reference(rows_NK, weights_NKC, self.values, block_NK, num_blocks)


def _competitor(
    layer: Layer, modules: tuple[nn.Module, ...], shape: tuple[int, ...], backward: bool, backend: str
) -> Competitor:
    """Time a layer on fresh normal tokens; gradients of the run before are dropped, untimed."""
    pools = [pool for pool in modules if isinstance(pool, MemoryPool)]
    for module in modules:
        module.train(backward)

    def prepare() -> Callable[[], object]:
        for module in modules:
            module.zero_grad(set_to_none=True)
        for pool in pools:
            for collector in (pool.value_gradients, pool.pre_value_gradients):
                if collector is not None:
                    collector.clear()
        x, gradient = torch.randn(shape, requires_grad=backward), torch.randn(shape)

        def forward() -> None:
            with torch.no_grad(), use_backend(backend):
                layer(x)

        def forward_backward() -> None:
            with use_backend(backend):
                layer(x).backward(gradient)
                for pool in pools:
                    for collector in (pool.value_gradients, pool.pre_value_gradients):
                        if collector is not None:
                            collector.coalesce()

        return forward_backward if backward else forward

    prepare()()
    return Competitor(prepare)


def _ours(layer: MemoryLayer, pool: MemoryPool) -> Layer:
    return lambda x: layer(x, pool).output


def _ultramem_v2(sizes: LayerSizes, backward: bool, use_compile: bool) -> Builders:
    config = UltraMemV2Config(
        num_keys=sizes.num_keys,
        key_dim=sizes.key_dim,
        value_dim=sizes.value_dim,
        pre_value_dim=sizes.value_dim,
        top_k=sizes.top_k,
        num_cores=sizes.num_cores,
    )
    layer, pool = UltraMemV2(sizes.hidden_size, config), UltraMemV2.make_pool(sizes.hidden_size, config)
    shape = (1, sizes.num_tokens, sizes.hidden_size)

    def on_backend(backend: str) -> Competitor:
        return _competitor(_ours(layer, pool), (layer, pool), shape, backward, backend)

    def row_gradients() -> Competitor:
        # Its pool reads the same rows.
        rows = MemoryPool(pool.num_rows, sizes.value_dim, sizes.value_dim, std=None, table_gradients="rows")
        rows.values, rows.pre_values = pool.values, pool.pre_values
        return _competitor(_ours(layer, rows), (layer, rows), shape, backward, "cpu")

    def compiled_reference() -> Competitor:
        plain = _PlainPool(pool.num_rows, sizes.value_dim, sizes.value_dim, std=None)
        plain.values, plain.pre_values = pool.values, pool.pre_values
        return _competitor(compiled(_ours(layer, plain)), (layer, plain), shape, backward, "reference")

    def plain_pytorch() -> Competitor:
        return _competitor(partial(plain_ultramem_v2, layer, pool), (layer, pool), shape, backward, "reference")

    def ultra_mem() -> Competitor:
        other = ultra_mem_layer(
            sizes.hidden_size, sizes.num_keys, sizes.key_dim, sizes.value_dim, sizes.top_k, sizes.num_cores
        )
        return _competitor(_first(other), (other,), shape, backward, "reference")

    builders: dict[str, Callable[[], Competitor]] = {OURS: lambda: on_backend("cpu")}
    if backward:
        builders[ROWS] = row_gradients
    builders[REFERENCE] = lambda: on_backend("reference")
    builders[PLAIN] = plain_pytorch
    if use_compile:
        builders[COMPILED] = compiled_reference
    builders[ULTRA_MEM] = ultra_mem
    return builders


def _first(module: nn.Module) -> Layer:
    """The first of the results that a layer returns."""
    return lambda x: module(x)[0]


def _product_keys(sizes: LayerSizes, **settings: Any) -> dict[str, Any]:
    return {
        "num_keys": sizes.product_keys,
        "key_dim": sizes.key_dim,
        "num_heads": sizes.product_heads,
        "top_k": sizes.top_k,
        "query_bias": False,
        **settings,
    }


def _beside(
    sizes: LayerSizes, backward: bool, layer: MemoryLayer, pool: MemoryPool, peer: str, build_peer: Any
) -> Builders:
    shape = (1, sizes.product_tokens, sizes.hidden_size)

    def theirs() -> Competitor:
        other = build_peer(sizes.hidden_size, sizes.product_keys, sizes.key_dim, sizes.product_heads, sizes.top_k)
        return _competitor(other, (other,), shape, backward, "reference")

    assert peer in PEERS
    return {
        OURS: lambda: _competitor(_ours(layer, pool), (layer, pool), shape, backward, "cpu"),
        REFERENCE: lambda: _competitor(_ours(layer, pool), (layer, pool), shape, backward, "reference"),
        peer: theirs,
    }


def _peer(sizes: LayerSizes, backward: bool) -> Builders:
    config = PEERConfig(**_product_keys(sizes))
    layer, pool = PEER(sizes.hidden_size, config), PEER.make_pool(sizes.hidden_size, config)
    return _beside(sizes, backward, layer, pool, "PEER-pytorch", peer_layer)


def _pkm(sizes: LayerSizes, backward: bool) -> Builders:
    config = PKMConfig(**_product_keys(sizes, query_norm="rms"))
    layer, pool = PKM(sizes.hidden_size, config), PKM.make_pool(sizes.hidden_size, config)
    return _beside(sizes, backward, layer, pool, "product-key-memory", product_key_layer)
