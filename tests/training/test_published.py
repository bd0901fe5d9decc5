"""The configs of the published runs: sizes, one recipe for all, and the tables from published settings to fields."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from ultramem.model import cost_card
from ultramem.training.config import RunConfig, load_config
from ultramem.training.dry_run import summarize
from ultramem.training.run import model_config
from ultramem.training.scale import SCALES
from ultramem.training.schedule import build_schedules

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "configs" / "ultramem_v2_227m_1.2b.yaml"
# Totals in billions, embeddings included. The last two are counts: the paper's number for UltraMemV2 does not add up,
# and the dense model is ours.
TOTALS = {
    "ultramem_v2_227m_1.2b": 1.226,
    "ultramem_227m_1.2b": 1.231,
    "memory_plus_227m_1.2b": 1.236,
    "olmoe_227m_1.2b": 1.219,
    "olmoe_1b_7b": 6.919,
    "ultramem_v2_1b_7b": 6.419,
    "dense_227m": 0.2304,
}
NO_FIELD = "—"


def setting_rows() -> list[list[str]]:
    """Rows of the tables in docs/published_run.md: flag or setting, field, value, remark."""
    text = (ROOT / "docs" / "published_run.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert {len(row) for row in rows} == {4}
    return [row for row in rows if row[1] != "field"]


def field_of(config: RunConfig, path: str) -> Any:
    """The value at a dotted path; settings of the model may be defaults of its config."""
    section, *keys = path.split(".")
    value: Any = vars(model_config(config)) if section == "model" else getattr(config, section)
    for key in keys:
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_are_the_published_ones(name):
    card = cost_card(model_config(load_config(ROOT / "configs" / f"{name}.yaml")))
    assert card.total_parameters == pytest.approx(TOTALS[name] * 1e9, rel=0.005)


@pytest.mark.parametrize("name", TOTALS)
def test_all_runs_share_the_recipe(name):
    config, reference = load_config(ROOT / "configs" / f"{name}.yaml"), load_config(REFERENCE)
    for section in ("data", "optimizer", "schedule", "checkpoint", "validation"):
        assert getattr(config, section) == getattr(reference, section), section
    config.training.max_tokens = reference.training.max_tokens
    assert config.training == reference.training
    assert config.run.save_folder == f"runs/{name}"
    assert (config.logging.memory_interval_steps is None) == (config.model["memory"] is None)


@pytest.mark.parametrize(("name", "num_tokens"), [("ultramem_v2_227m_1.2b", 5e11), ("olmoe_1b_7b", 1e12)])
def test_tokens_and_steps(name, num_tokens):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.training.max_tokens == num_tokens
    assert config.num_steps == -(-num_tokens // (768 * 4096))


def test_learning_rates_at_the_corners_of_the_published_schedule():
    """In tokens: start, end of the warmup, half of the run, end."""
    config = load_config(REFERENCE)
    schedules = build_schedules(config)

    def rate(group: str, tokens: float) -> float:
        return schedules[group].get_lr(config.optimizer.lr, tokens, config.num_tokens)

    assert rate("dense", 0) == pytest.approx(4e-5)
    assert rate("dense", 1e10) == pytest.approx(4e-4)
    assert rate("dense", 5e11) == pytest.approx(4e-5)
    for tokens, times in ((1e10, 4 - 3 * 0.02), (2.5e11, 2.5), (5e11, 1.0)):
        assert rate("tables", tokens) == pytest.approx(times * rate("dense", tokens))


def test_every_published_setting_has_its_field_and_the_config_its_value():
    config, rows = load_config(REFERENCE), setting_rows()
    assert len(rows) >= 60
    for setting, field, value, remark in rows:
        if field == NO_FIELD:
            assert value == NO_FIELD, setting
            assert len(remark) > 20, f"{setting} has neither a field nor a reason"
            continue
        name = re.fullmatch(r"`([a-z0-9_.]+)`", field)
        assert name, f"{setting}: {field} names no field"
        expected, found = yaml.safe_load(value.strip("`")), field_of(config, name[1])
        assert (list(found) if isinstance(found, tuple) else found) == expected, setting


def test_fields_of_the_recipe_are_written_out_in_every_config():
    """A default that changes does not change a published run."""
    fields = [row[1].strip("`").split(".") for row in setting_rows() if row[1] != NO_FIELD]
    written_out = [path for path in fields if path[0] != "model"]
    assert len(written_out) > 20
    for name in TOTALS:
        settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        for section, key in written_out:
            assert key in settings[section], f"{name}: {section}.{key}"


def test_the_table_names_what_the_published_command_says():
    """Sizes of the command itself, where it counts otherwise than we do."""
    flags = dict(row[0].strip("`-").split("=", 1) for row in setting_rows() if row[0].startswith("`--"))
    assert len(flags) > 40
    config = load_config(REFERENCE)
    model = model_config(config)
    assert int(flags["model.mlp_hidden_size"]) == 2 * model.intermediate_size
    assert int(flags["model.d_model"]) == model.hidden_size
    assert int(flags["model.mem_knum"]) == model.memory_config.num_keys
    assert float(flags["model.init_std"]) == pytest.approx(model.linear_std)
    assert float(flags["max_duration"].rstrip("T")) == config.training.max_tokens
    assert int(flags["global_train_batch_size"]) == config.training.global_batch_sequences


def test_the_figures_of_reproducing_md_are_those_of_the_dry_run():
    text = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:3] == "| `"]
    assert {row[0] for row in rows} == set(TOTALS)
    for name, parameters, _, flops_per_token, flops, memory, hours in rows:
        figures = dict(summarize(load_config(ROOT / "configs" / f"{name}.yaml"), None))
        assert figures["parameters"] == parameters
        assert figures["FLOPs per token, training"] == flops_per_token
        assert figures["FLOPs of the run"] == flops
        assert figures["memory per process: all"] == memory
        assert round(float(flops) / (3600 * 989e12 * 0.3)) == pytest.approx(int(hours.replace(",", "")), abs=1)


def test_the_overrides_of_reproducing_md_are_accepted():
    text = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    overrides = re.findall(r"[a-z_]+\.[a-z_]+=[\w.]+", text[text.index("For UltraMem's own recipe") :])
    assert len(overrides) == 9
    config = load_config(ROOT / "configs" / "ultramem_227m_1.2b.yaml", overrides)
    assert config.num_steps == 238_418
    assert config.num_tokens == pytest.approx(1e12, rel=0.001)


def test_the_torchrun_commands_of_training_md_are_ones_that_torchrun_reads():
    """Options exist, and what they start is `ultramem train` on a config that there is. Nothing is run."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:srun )?torchrun (.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        arguments = get_args_parser().parse_args(shlex.split(re.sub(r"\$SLURM\w+", "4", command)))
        assert (arguments.module, arguments.training_script) == (True, "ultramem.cli")
        verb, config, *overrides = arguments.training_script_args
        loaded = load_config(ROOT / config, overrides)
        num_processes = int(arguments.nnodes.partition(":")[2] or arguments.nnodes) * int(arguments.nproc_per_node)
        assert verb == "train"
        assert (
            loaded.training.global_batch_sequences % ((loaded.training.micro_batch_sequences or 1) * num_processes) == 0
        )


def test_the_limits_of_tiny_are_documented():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    scale = SCALES["tiny"]
    for limits in (
        f"at most {scale.hidden_size}, {scale.num_attention_heads} (",
        f"at most {scale.num_hidden_layers}; a memory at block b moves to ⌊{scale.num_hidden_layers}b/L⌋",
        f"at most {scale.num_keys}, {scale.top_k}, {scale.num_memory_heads};",
        f"at most {scale.num_experts}, {scale.num_experts_per_tok} |",
        f"at most {scale.sequence_length_tokens} tokens, {scale.global_batch_sequences} and "
        f"{scale.micro_batch_sequences} sequences",
        f"at most {scale.num_steps} steps",
        f"`validation.tokens` at most {scale.validation_tokens}",
    ):
        assert limits in text, limits
