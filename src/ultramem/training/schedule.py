"""Learning rates as a function of tokens seen: linear warmup and cosine, times multipliers of keys and tables."""

from dataclasses import dataclass

from olmo_core.optim.scheduler import CosWithWarmup, Scheduler, SchedulerUnits

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
class MultipliedCosine(CosWithWarmup):
    """The dense parameters' schedule times a multiplier, so that warmup start and floor scale with it too.

    The multiplier is constant, or with a ``decay_fraction`` that of :func:`table_lr_times`.
    """

    multiplier: float = 1.0
    decay_fraction: float | None = None

    def get_lr(self, initial_lr: float, current: int, t_max: int) -> float:
        """The group's rate after ``current`` of ``self.t_max`` tokens; ``initial_lr`` is the dense parameters' peak."""
        assert self.t_max is not None
        base = super().get_lr(initial_lr, current, t_max)
        if self.decay_fraction is None:
            return base * self.multiplier
        return base * table_lr_times(self.multiplier, current, self.t_max, self.decay_fraction)


def build_schedules(config: RunConfig) -> dict[str, Scheduler]:
    """One scheduler per optimizer group name (see :mod:`ultramem.training.optim`), all in units of tokens."""
    schedule, optimizer = config.schedule, config.optimizer
    warmup_fraction = schedule.warmup_fraction
    if warmup_fraction is None and schedule.warmup_tokens is None:
        warmup_fraction = 0.01
    shared = {
        "units": SchedulerUnits.tokens,
        "warmup": schedule.warmup_tokens,
        "warmup_fraction": warmup_fraction,
        "warmup_min_lr": schedule.warmup_start_factor * optimizer.lr,
        "alpha_f": schedule.final_factor,
        # The horizon is the configured one, so that it does not move with the number of steps already taken.
        "t_max": config.num_tokens,
    }
    return {
        "dense": CosWithWarmup(**shared),
        "keys": MultipliedCosine(**shared, multiplier=optimizer.key_lr_multiplier),
        "tables": MultipliedCosine(
            **shared, multiplier=optimizer.table_lr_multiplier, decay_fraction=optimizer.table_lr_decay_fraction
        ),
    }
