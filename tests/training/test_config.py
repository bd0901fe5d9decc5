"""Configs: precedence, and messages that name the field."""

import pytest
import yaml

from tiny_training import tiny_settings
from ultramem.errors import ConfigError
from ultramem.model.presets import PRESETS
from ultramem.training.config import load_config
from ultramem.training.run import config_yaml, resolve_config


@pytest.fixture
def write_config(data_folder, tmp_path):
    """Writes the tiny settings with changes (dotted key → value) and returns the file."""

    def write(**changes):
        settings = tiny_settings(data_folder, tmp_path / "run")
        for section, values in changes.items():
            settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def test_defaults_file_and_overrides_win_in_this_order(write_config):
    config = load_config(write_config(), ["optimizer.lr=0.25", "model.memory.top_k=6", "model.memory.num_keys=10"])
    assert config.optimizer.lr == 0.25
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.training.max_steps == 12
    assert (config.model["memory"]["top_k"], config.model["memory"]["num_keys"]) == (6, 10)
    assert config.model["memory"]["key_dim"] == 8


def test_null_memory_is_a_dense_model_and_can_be_overridden_back(write_config):
    assert load_config(write_config(), ["model.memory=null"]).model["memory"] is None
    config = load_config(write_config(model={"memory": None}), ["model.memory.num_keys=4"])
    assert config.model["memory"] == {"num_keys": 4}


def test_numbers_as_yaml_writes_them(write_config):
    """YAML reads 1e-4 as text and 1e3 as a float."""
    config = load_config(
        write_config(), ["optimizer.lr=1e-4", "training.max_steps=null", "training.max_tokens=1e3", "run.seed=5.0"]
    )
    assert config.optimizer.lr == 1e-4
    assert config.training.max_tokens == 1000
    assert isinstance(config.training.max_tokens, int)
    assert config.num_steps == 8  # 1000 tokens in batches of 128, the last one whole


def test_save_folder_defaults_to_the_files_name(write_config):
    assert load_config(write_config(), ["run.save_folder=null"]).run.save_folder == "runs/config"


def test_resolved_config_reads_back_unchanged(write_config, tmp_path):
    config, _ = resolve_config(write_config(), ["optimizer.eps=1e-9"])
    (tmp_path / "resolved.yaml").write_text(config_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_vocabulary_and_special_tokens_come_from_the_data(write_config):
    config, manifest = resolve_config(write_config())
    assert config.model["vocab_size"] == manifest.vocab_size == 64
    assert (config.model["eos_token_id"], config.model["pad_token_id"]) == (0, 1)
    assert config.data.fingerprint == manifest.fingerprint
    assert resolve_config(write_config(), ["model.vocab_size=128"])[0].model["vocab_size"] == 128


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", r"unknown key 'optimiser': did you mean 'optimizer'\? Allowed here: checkpoint, data"),
        (
            "optimizer.learning_rate=1",
            r"unknown key 'optimizer.learning_rate'.*Allowed here: betas, eps, key_lr_multiplier, lr",
        ),
        ("optimizer.weight_decy=1", r"unknown key 'optimizer.weight_decy': did you mean 'optimizer.weight_decay'\?"),
        ("model.hiden_size=8", r"unknown key 'model.hiden_size': did you mean 'model.hidden_size'\?"),
        ("model.memory.topk=8", r"unknown key 'model.memory.topk': did you mean 'model.memory.top_k'\?"),
        ("model.memory.type=pkmm", r"'model.memory.type' must be one of .*ultramem_v2.*; got 'pkmm'"),
        ("optimizer.lr=fast", r"'optimizer.lr' expects a number, but the text 'fast' was given"),
        ("optimizer.betas=[0.9]", r"'optimizer.betas' expects a list of 2 values, but the list \[0.9\] was given"),
        ("optimizer.betas=[0.9,x]", r"'optimizer.betas\[1\]' expects a number, but the text 'x' was given"),
        ("run.seed=true", r"'run.seed' expects a whole number, but the true/false value True was given"),
        ("run.seed=1.5", r"'run.seed' expects a whole number, but the number 1.5 was given"),
        ("training.compile=1", r"'training.compile' expects true or false, but the number 1 was given"),
        ("training.precision=fp16", r"'training.precision' expects one of bf16, fp32, but the text 'fp16' was given"),
        ("checkpoint.keep=few", r"'checkpoint.keep' expects a whole number or null, but the text 'few' was given"),
        ("optimizer=3", r"'optimizer' expects a section with keys of its own, but the number 3 was given"),
        ("model.hidden_size=wide", r"'model.hidden_size' expects a whole number, but the text 'wide' was given"),
        ("model.memory.num_keys=many", r"'model.memory.num_keys' expects a whole number, but the text 'many'"),
        ("model.memory.projection=mean", r"'model.memory.projection' expects one of sum, project, but the text 'mean'"),
        ("optimizer.lr=0", r"'optimizer.lr' must be greater than 0, but 0.0 was given"),
        ("optimizer.lr=.inf", r"'optimizer.lr' must be finite, but inf was given"),
        ("optimizer.eps=.nan", r"'optimizer.eps' must be finite, but nan was given"),
        ("optimizer.betas=[0.9,1.0]", r"'optimizer.betas' must be at least 0 and below 1, but \(0.9, 1.0\) was given"),
        ("optimizer.betas=[-0.1,0.9]", r"'optimizer.betas' must be at least 0 and below 1, but \(-0.1, 0.9\)"),
        ("run.seed=-1", r"'run.seed' must be between 0 and 4294967295, but -1 was given"),
        ("run.seed=4294967296", r"'run.seed' must be between 0 and 4294967295, but 4294967296 was given"),
        ("optimizer.max_grad_norm=0", r"'optimizer.max_grad_norm' must be greater than 0, or null for no clipping"),
        ("schedule.final_factor=2", r"'schedule.final_factor' must be between 0 and 1, but 2.0 was given"),
        ("checkpoint.keep=0", r"'checkpoint.keep' must be at least 1, but 0 was given"),
        ("training.max_tokens=9", r"exactly one of 'training.max_tokens' and 'training.max_steps'.*max_tokens=9"),
        ("training.max_steps=null", r"exactly one of 'training.max_tokens' and 'training.max_steps'.*None"),
        ("training.micro_batch_sequences=3", r"'training.micro_batch_sequences' \(3\) must divide.*\(4\)"),
        (
            "schedule.warmup_tokens=9",
            r"only one of 'schedule.warmup_tokens' and .*: warmup_tokens=9, warmup_fraction=0.25",
        ),
        (
            "optimizer.table_moments=8bit",
            r"'optimizer.table_moments: 8bit' needs the row-wise optimizer: set 'training.table_gradients' to rows",
        ),
        ("optimizer.table_moments=fp8", r"'optimizer.table_moments' expects one of fp32, bf16, 8bit"),
        (
            "optimizer={table_lr: 1e-3, table_lr_multiplier: 4}",
            r"only one of 'optimizer.table_lr'.* 'optimizer.table_lr_multiplier'; given: table_lr=0.001, .*=4.0",
        ),
        ("optimizer.table_lr=0", r"'optimizer.table_lr' must be greater than 0, but 0.0 was given"),
        ("schedule.name=step", r"'schedule.name' expects one of cosine, wsd, constant, linear"),
        ("schedule.warmup_start_factor=1", r"'schedule.warmup_start_factor' must be at least 0 and below 1"),
        ("schedule.decay_fraction=0", r"'schedule.decay_fraction' must be greater than 0, but 0.0 was given"),
        ("schedule.decay_fraction=1.5", r"'schedule.decay_fraction' must be between 0 and 1, but 1.5 was given"),
        (
            "schedule={name: wsd, final_factor: 1}",
            r"'schedule.final_factor' 1 leaves nothing to decay to: use .*constant",
        ),
        (
            "schedule={name: wsd, warmup_fraction: 0.5, decay_fraction: 0.75}",
            r"the warmup \(768 tokens\) and 'schedule.decay_fraction' 0.75 of the run \(1,152 tokens\) must fit",
        ),
        ("data.folder=null", r"'data.folder' is missing: give the folder that `ultramem data prepare` wrote"),
        ("data.folder.part=1", r"override 'data.folder.part': 'data.folder' is a value, not a section"),
        ("optimizer.lr", r"override 'optimizer.lr' is not of the form section.key=value"),
        ("run.seed=[1", r"override 'run.seed=\[1': the value is not valid YAML"),
    ],
)
def test_mistakes_are_named(write_config, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_config(), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=60", r"'model.vocab_size' is 60, but the tokenizer of .* has 64 tokens"),
        ("data.fingerprint=other", r"'data.fingerprint' is other, but .* has tiny-4096"),
        (
            "data.sequence_length_tokens=65",
            r"max_position_embeddings' \(64\) is smaller than .* \(65\): leave it out or give 65",
        ),
    ],
)
def test_config_that_does_not_fit_the_data(write_config, override, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(write_config(), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", r"must hold sections .* as in configs/demo.yaml, but it holds a list: \[1, 2\]"),
        ("a: [", r"x.yaml' is not valid YAML, correct it there: (?s:.*)line 1"),
        (None, "cannot read the config .*x.yaml': No such file.*Expected a YAML file"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_another_memory_by_one_word_sets_aside_what_it_lacks(write_config, capsys):
    file = write_config(model={"memory": {"num_keys": 10, "pre_value_dim": 4, "top_k": 5}})
    config = load_config(file, ["model.memory.type=pkm", "model.memory.num_heads=2"])
    assert config.model["memory"] == {"type": "pkm", "num_keys": 10, "top_k": 5, "num_heads": 2}
    assert "model.memory.pre_value_dim: of ultramem_v2, which pkm does not have; left out" in capsys.readouterr().err


def test_another_memory_does_not_hide_mistakes(write_config):
    with pytest.raises(ConfigError, match=r"unknown key 'model\.memory\.num_key'"):
        load_config(write_config(model={"memory": {"num_key": 10}}), ["model.memory.type=pkm"])
    with pytest.raises(ConfigError, match=r"unknown key 'model\.memory\.rank'"):
        load_config(write_config(model={"memory": {}}), ["model.memory.type=pkm", "model.memory.rank=2"])


def test_a_mixture_of_experts_by_one_word(write_config):
    config = load_config(write_config(), ["model.ffn.type=moe", "model.ffn.num_experts=4", "model.memory=null"])
    assert config.model["ffn"] == {"type": "moe", "num_experts": 4}
    with pytest.raises(ConfigError, match=r"'model\.ffn\.type' must be one of dense, moe; got 'mow'"):
        load_config(write_config(), ["model.ffn.type=mow"])


def test_a_preset_is_the_model_and_what_stands_beside_it_wins(write_config):
    preset = PRESETS["tiny-ultramem_v2"]
    file = write_config()
    settings = yaml.safe_load(file.read_text())
    settings["model"] = {"preset": "tiny-ultramem_v2", "vocab_size": 99, "memory": {"top_k": 3}}
    file.write_text(yaml.safe_dump(settings))
    model = load_config(file, ["model.hidden_size=64"]).model
    assert model == {**preset, "vocab_size": 99, "hidden_size": 64, "memory": {**preset["memory"], "top_k": 3}}
    switched = load_config(file, ["model.memory.type=pkm"]).model["memory"]
    assert switched["type"] == "pkm"
    assert switched["top_k"] == 3
    assert "pre_value_dim" not in switched


def test_a_preset_as_an_override_replaces_the_model_section(write_config):
    config = load_config(write_config(model={"hidden_size": 24}), ["model.preset=tiny-pkm", "model.vocab_size=77"])
    assert config.model == {**PRESETS["tiny-pkm"], "vocab_size": 77}
    with pytest.raises(ConfigError, match=r"there is no preset 'tiny-pkn'; did you mean tiny-pkm\?"):
        load_config(write_config(), ["model.preset=tiny-pkn"])
