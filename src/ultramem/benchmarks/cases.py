"""A case: competitors that do the same thing at the same sizes, and what came of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ultramem.benchmarks.measure import CPU_DEVICE, Competitor, Tick, Timing, alternate
from ultramem.errors import BackendError, PeerError


@dataclass(frozen=True)
class Case:
    """Times of competitors at one set of sizes.

    Attributes:
        name: of the case.
        sizes: what it was measured at, in words.
        timings: by competitor.
        unavailable: competitor → why it did not run, and what to do.
        at_target_sizes: whether the project's targets are stated for these sizes.
        bytes_read: what each competitor has to read in one run; None where that differs or is not counted.
        num_tokens: tokens of one run, where a rate is of interest.
        facts: further numbers, by name.
    """

    name: str
    sizes: str
    timings: dict[str, Timing]
    unavailable: dict[str, str] = field(default_factory=dict)
    at_target_sizes: bool = True
    bytes_read: int | None = None
    num_tokens: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, peak_bytes_per_s: float) -> dict[str, Any]:
        """All numbers, for JSON."""
        competitors: dict[str, Any] = {}
        for name, timing in self.timings.items():
            competitors[name] = timing.to_dict()
            if self.bytes_read is not None:
                rate = self.bytes_read / timing.median_s
                competitors[name] |= {"bytes_per_s": rate, "share_of_peak": rate / peak_bytes_per_s}
            if self.num_tokens is not None:
                competitors[name]["tokens_per_s"] = self.num_tokens / timing.median_s
        return {
            "case": self.name,
            "sizes": self.sizes,
            "at_target_sizes": self.at_target_sizes,
            "bytes_read": self.bytes_read,
            "competitors": competitors,
            "unavailable": self.unavailable,
            **self.facts,
        }


Builders = Mapping[str, Callable[[], Competitor]]


def build_competitors(builders: Builders) -> tuple[dict[str, Competitor], dict[str, str]]:
    """Make competitors ready to run, and say of those that cannot run why.

    Args:
        builders: by name; what raises BackendError or PeerError is left out with the error's text.

    Returns:
        competitors, and reasons, both by name.
    """
    competitors: dict[str, Competitor] = {}
    unavailable: dict[str, str] = {}
    for name, build in builders.items():
        try:
            competitors[name] = build()
        except (BackendError, PeerError) as error:
            unavailable[name] = str(error)
    return competitors, unavailable


def measure_case(
    name: str,
    sizes: str,
    builders: Builders,
    num_runs: int,
    tick: Tick | None,
    device: torch.device = CPU_DEVICE,
    **fields: Any,
) -> Case:
    """Build the competitors of a case and time them in turns.

    Args:
        name: of the case.
        sizes: in words.
        builders: competitors by name (see `build_competitors`).
        num_runs: runs that count.
        tick: called after each run with what was run.
        device: that the competitors run on.
        **fields: of `Case`.
    """
    competitors, unavailable = build_competitors(builders)
    say = None if tick is None else lambda competitor: tick(f"{name}: {competitor}")
    timings = alternate(competitors, num_runs, tick=say, device=device)
    return Case(name, sizes, timings, unavailable, **fields)
