"""Continued training: a second stage starts from the first one's weights with data, schedule and length of its own."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tiny_sources import write_config
from tiny_training import metrics_lines, tiny_settings, training_state
from ultramem.errors import CheckpointError, DataError
from ultramem.model import UltraMemForCausalLM
from ultramem.training.loading import StartingPoint, starting_point
from ultramem.training.run import build_model, build_trainer, check_loadable, model_config, resolve_config, train


@pytest.fixture(scope="module")
def first_stage(data_folder, tmp_path_factory):
    """A run folder with the states and models of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("first")
    settings = tiny_settings(data_folder, folder / "run")
    settings["training"] |= {"max_steps": 8}
    settings["validation"] = {"interval_steps": None}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    train(*resolve_config(folder / "run.yaml"))
    return folder / "run"


@pytest.fixture
def second_stage(data_folder, tmp_path):
    """A configuration with longer sequences and four times the warmup."""
    return write_config(
        tmp_path / "second.yaml",
        {"folder": str(data_folder), "sequence_length_tokens": 64},
        tmp_path / "run",
        model={"attention_dropout": 0.0},
        schedule={"warmup_fraction": 1.0, "warmup_start_factor": 0.0},
        training={"max_steps": 3, "global_batch_sequences": 2, "micro_batch_sequences": 1},
        checkpoint={"interval_steps": None},
        validation={"interval_steps": None},
    )


def weights(folder):
    return load_file(folder / "model.safetensors")


def first_weights(config_path, *overrides):
    """The weights with which a run's first step starts."""
    config, manifest = resolve_config(config_path, list(overrides))
    trainer = build_trainer(config, manifest)
    if trainer.load_path is not None:
        trainer.maybe_load_checkpoint(trainer.load_path)
    return trainer, trainer.train_module.model.state_dict()


@pytest.mark.parametrize("start", ["", "step4", "step8", "step4-hf"])
def test_a_run_starts_from_the_weights_of_a_checkpoint(first_stage, second_stage, start):
    trainer, state = first_weights(second_stage, f"run.load_path={first_stage / start}")
    saved = weights(first_stage / ("step4-hf" if "4" in start else "step8-hf"))
    assert saved.keys() <= state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    assert trainer.global_step == 0
    assert trainer.data_loader.tokens_processed == 0
    assert not trainer.train_module.optim.state


def test_a_second_stage_has_its_own_schedule_and_resumes(first_stage, second_stage, tmp_path):
    """Warmup from 0 and decay are those of a fresh run; a further step resumes from it and not from the first stage."""
    folder = train(*resolve_config(second_stage, [f"run.load_path={first_stage}"]))
    assert folder.name == "step3-hf"
    lines = metrics_lines(tmp_path / "run")
    assert [line["optim/dense learning rate"] for line in lines] == pytest.approx([0.001, 0.002, 0.0003])
    assert [line["throughput/total tokens"] for line in lines] == [128, 256, 384]
    fresh = train(*resolve_config(second_stage, [f"run.save_folder={tmp_path / 'fresh'}"])).parent
    assert lines[0]["train/CE loss"] < metrics_lines(fresh)[0]["train/CE loss"] - 0.05
    # The path is not looked at any more once the run has a state of its own.
    config, manifest = resolve_config(second_stage, ["run.load_path=/nowhere", "training.max_steps=4"])
    assert starting_point(config) is None
    assert train(config, manifest).name == "step4-hf"
    assert [line["step"] for line in metrics_lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_optimizers_state_comes_along_on_request(first_stage, second_stage, tmp_path):
    override = [f"run.load_path={first_stage / 'step4'}", "run.load_optimizer=true", "optimizer.lr=0.5"]
    trainer, _ = first_weights(second_stage, *override)
    saved = training_state(first_stage / "step4", tmp_path)["optim"]["state"]
    moments = trainer.train_module.state_dict()["optim"]["state"]
    assert moments.keys() == saved.keys()
    for name in saved:
        assert torch.equal(moments[name]["exp_avg_sq"], saved[name]["exp_avg_sq"])
    # Rates are the new run's.
    assert {group["initial_lr"] for group in trainer.train_module.optim.param_groups} == {0.5}
    assert trainer.global_step == 0


def test_buffers_and_settings_of_a_model_folder(first_stage, second_stage):
    config, _ = resolve_config(second_stage, [f"run.load_path={first_stage / 'step8-hf'}"])
    model, saved = build_model(config), UltraMemForCausalLM.from_pretrained(first_stage / "step8-hf")
    assert model.config.attention_dropout == 0.0 != saved.config.attention_dropout
    for name, buffer in saved.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name]), name
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def refused(config_path, *overrides):
    config, manifest = resolve_config(config_path, list(overrides))
    check_loadable(config, model_config(config), manifest)


@pytest.mark.parametrize("start", ["", "step8-hf"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.hidden_size=32",
            r"belong to another model \(model\.hidden_size: 16 → 32\): set these to the checkpoint",
        ),
        ("model.memory.top_k=2", r"model\.memory\.top_k: 4 → 2"),
        ("model.memory=null", r"model\.memory: None → None|model\.memory\.\w+: .* → None"),
        ("model.vocab_size=80", r"model\.vocab_size: 64 → 80"),
    ],
)
def test_weights_of_another_model(first_stage, second_stage, start, override, message):
    with pytest.raises(CheckpointError, match=message):
        refused(second_stage, f"run.load_path={first_stage / start}", override)


def test_what_a_later_stage_may_change(first_stage, second_stage):
    changes = [
        "model.max_position_embeddings=256",
        "model.memory.output_dropout=0.3",
        "model.memory.key_balance_weight=0",
    ]
    trainer, state = first_weights(second_stage, f"run.load_path={first_stage}", *changes)
    settings = trainer.train_module.model.config
    assert settings.max_position_embeddings == 256
    assert (settings.memory["output_dropout"], settings.memory["key_balance_weight"]) == (0.3, 0)
    for name, tensor in weights(first_stage / "step8-hf").items():
        assert torch.equal(state[name], tensor), name
    refused(second_stage, f"run.load_path={first_stage}", *changes)


def test_paths_that_are_no_checkpoint(first_stage, second_stage, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; expected a model folder .* or a run folder"):
        refused(second_stage, f"run.load_path={tmp_path / 'nowhere'}")
    shutil.copytree(first_stage, tmp_path / "copy")
    (tmp_path / "copy" / "step8" / ".metadata.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"step8' is an incomplete training state .* or the run folder to take its"
    ):
        refused(second_stage, f"run.load_path={tmp_path / 'copy' / 'step8'}")
    (tmp_path / "copy" / "config.yaml").unlink()
    with pytest.raises(
        CheckpointError, match=r"the config\.yaml beside '.*step4', .* cannot be used: .*give the model f"
    ):
        refused(second_stage, f"run.load_path={tmp_path / 'copy'}")


def test_without_any_state_the_newest_model_is_taken(first_stage, second_stage, tmp_path):
    shutil.copytree(first_stage / "step4-hf", tmp_path / "models" / "step4-hf")
    config, _ = resolve_config(second_stage, [f"run.load_path={tmp_path / 'models'}"])
    assert starting_point(config) == StartingPoint(model_folder=tmp_path / "models" / "step4-hf")


def test_a_model_folder_has_no_optimizer_state(first_stage, second_stage):
    message = (
        r"'run\.load_optimizer' needs a training state, but '.*step8-hf' is a model folder, which holds weights only"
    )
    with pytest.raises(CheckpointError, match=message):
        refused(second_stage, f"run.load_path={first_stage / 'step8-hf'}", "run.load_optimizer=true")


def test_damaged_weights(first_stage, second_stage, tmp_path):
    shutil.copytree(first_stage / "step8-hf", tmp_path / "model")
    tensors = weights(tmp_path / "model")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        refused(second_stage, f"run.load_path={tmp_path / 'model'}")


@pytest.mark.parametrize("start", ["", "step8-hf"])
def test_another_tokenizer(first_stage, second_stage, tmp_path, data_folder, start):
    shutil.copytree(data_folder, tmp_path / "data")
    file = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"other"'))
    with pytest.raises(DataError, match="made with another tokenizer"):
        refused(second_stage, f"run.load_path={first_stage / start}", f"data.folder={tmp_path / 'data'}")
