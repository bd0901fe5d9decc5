"""Where memories stand in a decoder: in every block, in chosen blocks, or on spans that reach over several blocks."""

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

from ultramem.errors import ConfigError

Placement = str | Sequence[int]


class Span(NamedTuple):
    """A memory reads the FFN's input of block ``start`` and its result is added after block ``end``."""

    start: int
    end: int


def parse_placement(placement: Placement, num_blocks: int) -> list[Span]:
    """Read a placement.

    Args:
        placement: ``"every"`` (one memory per block), a list of block numbers, or spans ``"a:b/c:d"`` (UltraMem,
            arXiv 2411.12364, §3.1: read at block a, add after block b ≥ a; spans may overlap). Blocks count from 0.
        num_blocks: blocks of the decoder.

    Returns:
        One span per memory, ordered by start and then end; a block number b is the span (b, b).

    Raises:
        ConfigError: an unreadable placement, a block outside the decoder, or a span that ends before it starts.
    """
    allowed = f'Allowed are "every", a list of blocks in 0…{num_blocks - 1}, or spans such as "0:1/2:3".'
    if placement == "every":
        return [Span(block, block) for block in range(num_blocks)]
    try:
        if isinstance(placement, str):
            spans = [Span(*map(int, part.split(":"))) for part in placement.split("/")]
        else:
            spans = [Span(index(block), index(block)) for block in placement]
    except (TypeError, ValueError):
        raise ConfigError(f"memory.placement {placement!r} cannot be read. {allowed}") from None
    if not spans:
        raise ConfigError(f"memory.placement is empty; use memory: null for a model without memory. {allowed}")
    for span in spans:
        if not 0 <= span.start <= span.end < num_blocks:
            raise ConfigError(
                f"memory.placement {placement!r}: span {span.start}:{span.end} does not fit "
                f"{num_blocks} blocks. {allowed}"
            )
    return sorted(spans)
