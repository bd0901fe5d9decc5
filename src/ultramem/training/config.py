"""The configuration of a training run: one YAML file, dotted overrides, typed sections.

Precedence: defaults here < the YAML file < ``a.b=c`` overrides. The sections are OLMo-core ``Config`` dataclasses; the
model section is the keyword arguments of :class:`ultramem.model.UltraMemConfig`.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from olmo_core.config import Config

from ultramem.errors import ConfigError
from ultramem.training.data_section import DataSection, check_maskable
from ultramem.training.schema import check_section, parse_overrides, set_dotted

# Arithmetic of forward and backward; weights, gradients and moments are fp32 either way.
Precision = Literal["bf16", "fp32"]
# How gradients of the tables are held: one dense tensor, or only the touched rows.
TableGradients = Literal["dense", "rows"]
# How the two moments of the tables are kept.
TableMoments = Literal["fp32", "bf16", "8bit"]
ScheduleName = Literal["cosine", "wsd", "constant", "linear"]
# What several processes hold: all weights each, or the tables each and a share of the rest.
Parallel = Literal["ddp", "fsdp"]
# What becomes of a step whose loss or gradient is NaN or infinite.
OnNonfinite = Literal["stop", "skip"]


@dataclass
class RunSection(Config):
    """Where the run lives, where its weights come from, and the seed of everything random in it."""

    save_folder: str | None = None  # None: runs/<name of the YAML file>
    seed: int = 0
    load_path: str | None = None  # run folder, stepN or model folder whose weights the run starts from
    load_optimizer: bool = False  # the moments too, from a training state


@dataclass
class OptimizerSection(Config):
    """AdamW of the published runs; the tables' rate is ``lr`` times a multiplier that decays linearly to 1.

    Or, as in Memory+, a constant of their own that no schedule touches: ``table_lr`` in place of the multiplier. The
    keys and cores of the memories may have a rate of their own, a constant multiple of ``lr``.
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    key_lr_multiplier: float = 1.0
    table_lr: float | None = None
    table_lr_multiplier: float | None = None  # 4 if table_lr is not given either
    table_lr_decay_fraction: float = 1.0  # share of the run after which the multiplier has reached 1
    table_moments: TableMoments = "fp32"
    max_grad_norm: float | None = 1.0
    table_max_grad_norm: float | None = 1.0


@dataclass
class ScheduleSection(Config):
    """Linear warmup in tokens or as a share of the run, then a named shape down to the floor, the final factor.

    ``cosine`` and ``linear`` fall from the end of the warmup to the end of the run, ``wsd`` stays at the peak and falls
    linearly in the last share of the run, ``constant`` stays.
    """

    name: ScheduleName = "cosine"
    warmup_tokens: int | None = None
    warmup_fraction: float | None = None  # 0.01 if neither is given
    warmup_start_factor: float = 0.1
    final_factor: float = 0.1  # no effect on constant
    decay_fraction: float = 0.1  # of wsd: the share of the run that falls


@dataclass
class TrainingSection(Config):
    """Length of the run, batches, precision, processes, and what ends the run."""

    max_tokens: int | None = None
    max_steps: int | None = None
    global_batch_sequences: int = 32
    micro_batch_sequences: int | None = None  # None: the whole batch of one process at once
    precision: Precision = "bf16"
    compile: bool = False
    gradient_checkpointing: bool = False
    table_gradients: TableGradients = "dense"
    parallel: Parallel | None = None  # None: ddp where there are several processes
    on_nonfinite: OnNonfinite = "stop"  # a step whose loss or gradient is NaN or infinite
    max_skips_in_a_row: int = 10


@dataclass
class ValidationSection(Config):
    """Loss on the validation split and on that of further data folders, scores on tasks: every n steps and at the end.

    Tasks are those of ``ultramem eval --tasks``.
    """

    interval_steps: int | None = 500  # None: never
    tokens: int | None = None  # of each set; None: the whole split
    sets: dict[str, str] = field(default_factory=dict)  # name → data folder
    tasks: list[str] = field(default_factory=list)
    task_limit: int | None = None  # questions of each task; None: all
    tasks_interval_steps: int | None = 1000  # None: never


@dataclass
class CheckpointSection(Config):
    """Training states ``stepN`` and model folders ``stepN-hf``; one is always written at the end of the run."""

    interval_steps: int | None = 1000  # None: only at the end
    keep: int | None = 3  # None: all
    save_async: bool = True


@dataclass
class WandbSection(Config):
    """Where a run appears on Weights & Biases; a run without a name has that of its folder."""

    project: str | None = None  # required
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] | None = None
    notes: str | None = None


@dataclass
class LoggingSection(Config):
    """How often metrics go to the terminal, ``metrics.jsonl`` and TensorBoard, and whether to Weights & Biases."""

    interval_steps: int = 10
    tensorboard: bool = True
    memory_interval_steps: int | None = 50  # None: no memory statistics
    wandb: WandbSection | None = None


@dataclass
class RunConfig(Config):
    """A complete training run."""

    run: RunSection = field(default_factory=RunSection)
    model: dict[str, Any] = field(default_factory=dict)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)

    @property
    def global_batch_tokens(self) -> int:
        """Tokens of one optimizer step over all processes."""
        return self.training.global_batch_sequences * self.data.sequence_length_tokens

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.training.max_steps is not None:
            return self.training.max_steps
        assert self.training.max_tokens is not None
        return -(-self.training.max_tokens // self.global_batch_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run: the horizon of the schedule."""
        return self.training.max_tokens or self.num_steps * self.global_batch_tokens

    @property
    def micro_batch_sequences(self) -> int:
        """Sequences of one forward pass."""
        return self.training.micro_batch_sequences or self.training.global_batch_sequences

    @property
    def save_folder(self) -> Path:
        """The run folder."""
        assert self.run.save_folder is not None
        return Path(self.run.save_folder)

    def validate(self) -> None:
        """Raises ConfigError for values that no run can have."""
        _check_ranges(self)
        self.data.validate()
        check_maskable(self.data.mask_documents, self.model)
        if self.run.load_optimizer and self.run.load_path is None:
            raise ConfigError("'run.load_optimizer' needs 'run.load_path': the checkpoint that the state comes from")
        if (self.training.max_tokens is None) == (self.training.max_steps is None):
            raise ConfigError(
                "give the length of the run by exactly one of 'training.max_tokens' and 'training.max_steps'; "
                f"given: max_tokens={self.training.max_tokens}, max_steps={self.training.max_steps}"
            )
        if self.schedule.warmup_tokens is not None and self.schedule.warmup_fraction is not None:
            raise ConfigError(
                "give only one of 'schedule.warmup_tokens' and 'schedule.warmup_fraction'; given: "
                f"warmup_tokens={self.schedule.warmup_tokens}, warmup_fraction={self.schedule.warmup_fraction}"
            )
        if self.training.global_batch_sequences % self.micro_batch_sequences:
            raise ConfigError(
                f"'training.micro_batch_sequences' ({self.micro_batch_sequences}) must divide "
                f"'training.global_batch_sequences' ({self.training.global_batch_sequences})"
            )
        if self.logging.wandb is not None and not self.logging.wandb.project:
            raise ConfigError("'logging.wandb.project' is missing: name the project, or set 'logging.wandb' to null")
        if self.optimizer.table_lr is not None and self.optimizer.table_lr_multiplier is not None:
            raise ConfigError(
                "give only one of 'optimizer.table_lr', a constant rate, and 'optimizer.table_lr_multiplier'; given: "
                f"table_lr={self.optimizer.table_lr}, table_lr_multiplier={self.optimizer.table_lr_multiplier}"
            )
        if self.optimizer.table_moments != "fp32" and self.training.table_gradients != "rows":
            raise ConfigError(
                f"'optimizer.table_moments: {self.optimizer.table_moments}' needs the row-wise optimizer: set "
                "'training.table_gradients' to rows, or 'optimizer.table_moments' to fp32"
            )
        if self.schedule.name == "wsd":
            _check_wsd(self)

    @property
    def warmup_tokens(self) -> int:
        """Tokens of the warmup."""
        if self.schedule.warmup_tokens is not None:
            return self.schedule.warmup_tokens
        fraction = self.schedule.warmup_fraction
        return round(self.num_tokens * (0.01 if fraction is None else fraction))


def _check_wsd(config: RunConfig) -> None:
    schedule = config.schedule
    if schedule.final_factor == 1:
        raise ConfigError("'schedule.final_factor' 1 leaves nothing to decay to: use 'schedule.name: constant'")
    decay_tokens = round(schedule.decay_fraction * config.num_tokens)
    if decay_tokens < 1 or config.warmup_tokens + decay_tokens > config.num_tokens:
        raise ConfigError(
            f"the warmup ({config.warmup_tokens:,} tokens) and 'schedule.decay_fraction' {schedule.decay_fraction} of "
            f"the run ({decay_tokens:,} tokens) must fit into its {config.num_tokens:,} tokens, at least one token "
            "decaying: shorten one of them"
        )


def _check_ranges(config: RunConfig) -> None:
    at_least_one = {
        "data": ["sequence_length_tokens", "mixture_tokens"],
        "training": [
            "max_tokens",
            "max_steps",
            "global_batch_sequences",
            "micro_batch_sequences",
            "max_skips_in_a_row",
        ],
        "validation": ["interval_steps", "tokens", "task_limit", "tasks_interval_steps"],
        "checkpoint": ["interval_steps", "keep"],
        "logging": ["interval_steps", "memory_interval_steps"],
    }
    positive = {
        "optimizer": ["lr", "eps", "key_lr_multiplier", "table_lr", "table_lr_multiplier", "table_lr_decay_fraction"],
        "schedule": ["decay_fraction"],
    }
    limits = {"optimizer": ["max_grad_norm", "table_max_grad_norm"]}
    fractions = {"schedule": ["warmup_fraction", "final_factor", "decay_fraction"]}
    not_negative = {"optimizer": ["weight_decay"], "schedule": ["warmup_tokens"]}
    rules = [
        (at_least_one, lambda value: value >= 1, "at least 1"),
        (positive, lambda value: value > 0, "greater than 0"),
        (limits, lambda value: value > 0, "greater than 0, or null for no clipping"),
        (fractions, lambda value: 0 <= value <= 1, "between 0 and 1"),
        (not_negative, lambda value: value >= 0, "0 or greater"),
        (
            {"optimizer": ["betas"], "schedule": ["warmup_start_factor"]},
            lambda value: 0 <= value < 1,
            "at least 0 and below 1",
        ),
        # NumPy's generators take no other seeds.
        ({"run": ["seed"]}, lambda value: 0 <= value < 2**32, f"between 0 and {2**32 - 1}"),
    ]
    for names, is_valid, text in rules:
        for section, keys in names.items():
            for key in keys:
                value = getattr(getattr(config, section), key)
                values = value if isinstance(value, tuple) else (value,)
                if any(isinstance(number, float) and not math.isfinite(number) for number in values):
                    raise ConfigError(f"'{section}.{key}' must be finite, but {value} was given")
                if any(number is not None and not is_valid(number) for number in values):
                    raise ConfigError(f"'{section}.{key}' must be {text}, but {value} was given")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file, applies overrides, checks every key and type, and fills the defaults.

    Args:
        path: the YAML file.
        overrides: ``section.key=value`` texts; values are YAML, so ``model.memory=null`` makes the model dense.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a bad type or an impossible value.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config '{path}': {error.strerror}. Expected a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not valid YAML, correct it there: {error}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"'{path}' must hold sections (run, model, data, …) as in configs/demo.yaml, but it holds a "
            f"{type(data).__name__}: {str(data)[:40]}"
        )
    parsed = _expand_preset(data, parse_overrides(overrides))
    _switch_types(data.get("model"), dict(parsed))
    for key, value in parsed:
        set_dotted(data, key, value)
    data = check_section(data, RunConfig)
    data["model"] = check_model_section(data.get("model") or {})
    config = RunConfig.from_dict(data)
    if config.run.save_folder is None:
        config.run.save_folder = str(Path("runs") / path.stem)
    config.validate()
    return config


def _expand_preset(data: dict[str, Any], overrides: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Puts a preset's settings where ``model.preset`` names one, and returns the other overrides.

    Settings beside ``preset`` in the file win over the preset's; a preset given as an override stands in place of the
    file's whole model section.
    """
    from ultramem.model.presets import preset_settings

    given = [value for key, value in overrides if key == "model.preset"]
    model = {"preset": given[-1]} if given else data.get("model")
    if isinstance(model, dict) and (name := model.get("preset")) is not None:
        beside = {key: value for key, value in model.items() if key != "preset"}
        data["model"] = preset_settings(str(name), **beside)
    return [(key, value) for key, value in overrides if key != "model.preset"]


def _typed_sections() -> dict[str, dict[str, type]]:
    """Sections of the model whose keys depend on their ``type``: config class by type, the default type first."""
    from ultramem.layers import MEMORY_TYPES
    from ultramem.model.ffn import FFN_TYPES

    return {"memory": {name: kind.config for name, kind in MEMORY_TYPES.items()}, "ffn": dict(FFN_TYPES)}


def _switch_types(model: Any, overrides: dict[str, Any]) -> None:
    """Where an override names another type, sets aside what the file says about the old one, and says so.

    Only keys that the old type has and the new one lacks: a mistyped key is still found.
    """
    if not isinstance(model, dict):
        return
    for name, types_of_section in _typed_sections().items():
        section, new = model.get(name), overrides.get(f"model.{name}.type")
        if not isinstance(section, dict) or not isinstance(new, str) or new not in types_of_section:
            continue
        old = section.get("type", next(iter(types_of_section)))
        known_to = {
            kind: {field.name for field in dataclasses.fields(types_of_section[kind])}
            for kind in (old, new)
            if kind in types_of_section
        }
        left = sorted(key for key in section if key in known_to.get(old, ()) and key not in known_to[new])
        for key in left:
            del section[key]
        if left:
            settings = ", ".join(f"model.{name}.{key}" for key in left)
            print(f"{settings}: of {old}, which {new} does not have; left out", file=sys.stderr)


def check_model_section(model: dict[str, Any]) -> dict[str, Any]:
    """Checks the keys and types of the model section against the dataclasses of model, memory and FFN."""
    from ultramem.model import UltraMemConfig

    sections = _typed_sections()
    plain = {key: value for key, value in model.items() if key not in sections}
    checked = check_section(plain, UltraMemConfig, "model")
    for name, types_of_section in sections.items():
        if name not in model:
            continue
        checked[name] = section = model[name]
        if section is not None:
            default = next(iter(types_of_section))
            kind = section.get("type", default) if isinstance(section, dict) else default
            if kind not in types_of_section:
                raise ConfigError(f"'model.{name}.type' must be one of {', '.join(types_of_section)}; got {kind!r}")
            checked[name] = check_section(section, types_of_section[kind], f"model.{name}")
    return checked
