"""The speeds that the project aims at, in one place, and the judgement of measured ratios by them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ultramem.benchmarks.cases import Case

OURS = "cpu kernels"
FUSED = "cpu kernels, fused read"
ROWS = "cpu kernels, row gradients"
REFERENCE = "reference path"
PLAIN = "plain PyTorch"
ULTRA_MEM = "ultra-mem"
V2, DENSE, MOE = "UltraMemV2", "dense twin", "MoE twin"
OLMO2, OLMOE = "Olmo2ForCausalLM", "OlmoeForCausalLM"
DENSE_GRADIENTS, ROW_GRADIENTS = "UltraMemV2, dense table gradients", "UltraMemV2, row gradients"

DECODE_BATCH_SIZES = (1, 4, 16, 64, 256)

Quantity = Literal["bandwidth", "times faster", "times the time"]


@dataclass(frozen=True)
class Target:
    """What a ratio of two measurements of one run has to be.

    Attributes:
        benchmark: ``op``, ``layer``, ``decode`` or ``train``.
        case: name of the case that is judged.
        quantity: ``bandwidth``, the share of the peak read bandwidth; ``times faster``, the time of ``against`` over
            that of ``ours``; ``times the time``, the inverse.
        bound: the least allowed ratio, for ``times the time`` the most.
        ours: the competitor that is judged.
        against: the competitor that it is compared with; None for ``bandwidth``.
        goal: a further ratio that is aimed at.
    """

    benchmark: str
    case: str
    quantity: Quantity
    bound: float
    ours: str = OURS
    against: str | None = None
    goal: float | None = None

    @property
    def text(self) -> str:
        """The target in words."""
        if self.quantity == "bandwidth":
            words = f"at least {self.bound:.0%} of peak read bandwidth"
        elif self.quantity == "times the time":
            words = f"at most {self.bound:g}× the time of {self.against}"
        else:
            words = f"at least {self.bound:g}× as fast as {self.against}"
        if self.goal is not None:
            words += f" (goal {self.goal:.0%})" if self.quantity == "bandwidth" else f" (goal {self.goal:g}×)"
        return words


def _decode_targets() -> tuple[Target, ...]:
    targets = []
    for batch in DECODE_BATCH_SIZES:
        case = f"batch {batch}"
        olmoe = (4.0, 6.0) if batch == 16 else (1.0, None)
        targets += [
            Target("decode", case, "times the time", 1.25, V2, DENSE),
            Target("decode", case, "times faster", 2.0 if batch == 1 else 1.0, DENSE, OLMO2),
            Target("decode", case, "times faster", olmoe[0], V2, OLMOE, goal=olmoe[1]),
        ]
    return tuple(targets)


TARGETS: tuple[Target, ...] = (
    Target("op", "lookup, 2,048 tokens", "bandwidth", 0.6, goal=0.8),
    Target("op", "lookup, 2,048 tokens", "bandwidth", 0.6, FUSED, goal=0.8),
    Target("op", "lookup, 1 token", "times faster", 8.0, against=PLAIN),
    Target("op", "lookup, 1 token", "times faster", 8.0, FUSED, PLAIN),
    Target("op", "growth", "times the time", 1.5, "16,777,216 rows", "1,048,576 rows"),
    Target("layer", "forward", "times faster", 6.0, against=REFERENCE),
    Target("layer", "forward", "times faster", 8.0, against=ULTRA_MEM),
    Target("layer", "forward + backward", "times faster", 4.0, against=REFERENCE),
    Target("layer", "forward + backward", "times faster", 5.0, against=ULTRA_MEM),
    *_decode_targets(),
    Target("train", "training step", "times faster", 0.75, DENSE_GRADIENTS, DENSE),
    Target("train", "training step", "times faster", 0.75, ROW_GRADIENTS, DENSE),
)


@dataclass(frozen=True)
class Verdict:
    """A target with what was measured.

    Attributes:
        target: the target.
        ratio: what was measured, None where that was not possible.
        met: whether the target is; None where it was not measured, or at other sizes.
        reason: why it was not judged, else empty.
    """

    target: Target
    ratio: float | None
    met: bool | None
    reason: str = ""

    @property
    def word(self) -> str:
        """``met``, ``MISSED`` or ``not judged: …``."""
        return f"not judged: {self.reason}" if self.met is None else "met" if self.met else "MISSED"

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        target = self.target
        return {
            "case": target.case,
            "competitor": target.ours,
            "target": target.text,
            "quantity": target.quantity,
            "bound": target.bound,
            "goal": target.goal,
            "ratio": self.ratio,
            "met": self.met,
            "goal_met": self.ratio >= target.goal if self.met is not None and self.ratio and target.goal else None,
            "reason": self.reason,
        }


def judge(benchmark: str, cases: Sequence[Case], peak_bytes_per_s: float) -> list[Verdict]:
    """Compare a benchmark's cases with its targets.

    Args:
        benchmark: whose targets.
        cases: what was measured.
        peak_bytes_per_s: read bandwidth of the same run.
    """
    by_name = {case.name: case for case in cases}
    return [
        _judge(target, by_name.get(target.case), peak_bytes_per_s)
        for target in TARGETS
        if target.benchmark == benchmark
    ]


def _judge(target: Target, case: Case | None, peak_bytes_per_s: float) -> Verdict:
    if case is None:
        return Verdict(target, None, None, "this case was left out")
    for name in (target.ours, target.against):
        if name is not None and name not in case.timings:
            return Verdict(target, None, None, f"{name} {'cannot run' if name in case.unavailable else 'was left out'}")
    ours_s = case.timings[target.ours].median_s
    if target.against is None:
        assert case.bytes_read is not None, f"case {case.name!r} does not say what it reads"
        ratio = case.bytes_read / ours_s / peak_bytes_per_s
    else:
        ratio = case.timings[target.against].median_s / ours_s
    if target.quantity == "times the time":
        ratio = 1 / ratio
    if not case.at_target_sizes:
        return Verdict(target, ratio, None, "other sizes or another device than the target's")
    met = ratio <= target.bound if target.quantity == "times the time" else ratio >= target.bound
    return Verdict(target, ratio, met)
