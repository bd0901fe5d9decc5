"""Learning rates as a function of tokens seen: a named schedule, times multipliers of keys and tables."""

from dataclasses import dataclass, field

from olmo_core.optim.scheduler import (
    WSD,
    ConstantScheduler,
    ConstantWithWarmup,
    CosWithWarmup,
    LinearWithWarmup,
    Scheduler,
    SchedulerUnits,
)

from ultramem.training.config import RunConfig


def table_lr_times(start: float, current_tokens: float, total_tokens: float, decay_fraction: float) -> float:
    """The tables' multiplier, ``times(s) = 1 + (t0 − 1)·max(0, 1 − s/(T·ρ))``.

    Args:
        start: t0, the multiplier at the start of the run.
        current_tokens: s, tokens seen, this step's included (or steps, if ``total_tokens`` counts steps).
        total_tokens: T, length of the run in the same unit.
        decay_fraction: ρ, share of the run after which the multiplier has reached 1.
    """
    return 1.0 + (start - 1.0) * max(0.0, 1.0 - current_tokens / (total_tokens * decay_fraction))


@dataclass
class FixedRate(Scheduler):
    """A rate that no schedule touches (Memory+'s tables)."""

    rate: float = 0.0

    def get_lr(self, initial_lr: float, current: int, t_max: int) -> float:
        """The rate."""
        return self.rate


@dataclass
class Multiplied(Scheduler):
    """The dense parameters' schedule times a multiplier, so that warmup start and floor scale with it too.

    The multiplier is constant, or with a ``decay_fraction`` that of :func:`table_lr_times`. The horizon is the
    configured one, so that it does not move with the number of steps already taken.
    """

    base: Scheduler = field(default_factory=ConstantScheduler)
    horizon_tokens: int = 0
    multiplier: float = 1.0
    decay_fraction: float | None = None

    def get_lr(self, initial_lr: float, current: int, t_max: int) -> float:
        """The group's rate after ``current`` tokens; ``initial_lr`` is the dense parameters' peak."""
        # The last batch may reach beyond the horizon.
        current = min(current, self.horizon_tokens)
        rate = self.base.get_lr(initial_lr, current, self.horizon_tokens)
        if self.decay_fraction is None:
            return rate * self.multiplier
        return rate * table_lr_times(self.multiplier, current, self.horizon_tokens, self.decay_fraction)


def build_base_schedule(config: RunConfig) -> Scheduler:
    """The dense parameters' schedule by its name: OLMo-core's."""
    schedule, peak = config.schedule, config.optimizer.lr
    warmup = {"warmup": config.warmup_tokens, "warmup_min_lr": schedule.warmup_start_factor * peak}
    match schedule.name:
        case "cosine":
            return CosWithWarmup(**warmup, alpha_f=schedule.final_factor)
        case "linear":
            return LinearWithWarmup(**warmup, alpha_f=schedule.final_factor)
        case "constant":
            return ConstantWithWarmup(**warmup)
        case "wsd":
            floor = schedule.final_factor * peak
            return WSD(**warmup, decay_fraction=schedule.decay_fraction, decay_min_lr=floor)


def build_schedules(config: RunConfig) -> dict[str, Scheduler]:
    """One scheduler per optimizer group name (see :mod:`ultramem.training.optim`), all in units of tokens."""
    optimizer = config.optimizer
    tokens = {"units": SchedulerUnits.tokens}
    shared = {**tokens, "base": build_base_schedule(config), "horizon_tokens": config.num_tokens}
    start = 4.0 if optimizer.table_lr_multiplier is None else optimizer.table_lr_multiplier
    return {
        "dense": Multiplied(**shared),
        "keys": Multiplied(**shared, multiplier=optimizer.key_lr_multiplier),
        "tables": (
            Multiplied(**shared, multiplier=start, decay_fraction=optimizer.table_lr_decay_fraction)
            if optimizer.table_lr is None
            else FixedRate(**tokens, rate=optimizer.table_lr)
        ),
    }
