"""The ``data`` section: exactly one kind of source, and settings that belong together."""

import pytest

from tiny_sources import write_config
from ultramem.errors import ConfigError
from ultramem.training.config import load_config
from ultramem.training.dry_run import print_dry_run, resolve_dry_run


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"'data\.folder' is missing: give the folder .* or raw token files by 'data\.files', or several sources"),
        (
            {"folder": "a", "files": ["b"]},
            r"only one of 'data\.folder', 'data\.files' and 'data\.sources'; given: fold",
        ),
        ({"folder": "a", "sources": [{"folder": "b"}]}, r"given: folder, sources"),
        ({"files": [], "tokenizer": "t"}, r"'data\.files' is an empty list: name at least one"),
        ({"sources": []}, r"'data\.sources' is an empty list"),
        ({"files": ["a.npy"]}, r"raw token files \('files'\) do not say how they were made: give 'data\.tokenizer'"),
        ({"sources": [{"files": ["a.npy"]}]}, r"give 'data\.tokenizer'"),
        ({"sources": [{"weight": 1.0}]}, r"'data\.sources\[0\]' needs exactly one of 'folder' and 'files'"),
        ({"sources": [{"folder": "a"}, {"folder": "a", "files": ["b"]}]}, r"'data\.sources\[1\]' needs exactly one of"),
        (
            {"sources": [{"folder": "a", "weight": 0}]},
            r"'data\.sources\[0\]\.weight' must be greater than 0, but 0\.0 w",
        ),
        ({"sources": [{"folder": "a", "weight": float("inf")}]}, r"weight' must be greater than 0"),
        ({"sources": [{"folder": "a", "wieght": 1}]}, r"unknown key 'data\.sources\[0\]\.wieght': did you mean"),
        (
            {"folder": "a", "mixture_tokens": 64},
            r"'data\.mixture_tokens' is the length of a mixture: it needs 'data\.so",
        ),
        ({"sources": [{"folder": "a"}], "mixture_tokens": 0}, r"'data\.mixture_tokens' must be at least 1"),
        (
            {"folder": "a", "tokenizer": "t"},
            r"'data\.tokenizer' is about raw token files .* the folder says this itself",
        ),
        ({"folder": "a", "dtype": "uint8"}, r"'data\.dtype' expects one of uint16, uint32 or null"),
        ({"folder": "a", "validation_files": ["v"]}, r"'data\.validation_files' is about raw token files"),
    ],
)
def test_what_names_no_data(tmp_path, data, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_config(tmp_path / "c.yaml", data, tmp_path / "run"))


def test_masked_documents_do_not_go_with_a_memory_that_looks_back(tmp_path):
    memory = {"type": "ultramem", "num_keys": 8, "key_dim": 8, "query_conv": 3}
    path = write_config(tmp_path / "c.yaml", {"folder": "a", "mask_documents": True}, tmp_path / "run")
    message = (
        r"'data\.mask_documents: true' does not go with this memory \('model\.memory\.type: ultramem'\): its queries "
        r"read 2 tokens before their own, .* Set mask_documents to false, or .*\(query_conv 0\)"
    )
    with pytest.raises(ConfigError, match=message):
        load_config(path, [f"model.memory={memory}"])
    for taps in (0, 1):
        assert load_config(path, [f"model.memory={memory | {'query_conv': taps}}"]).data.mask_documents
    assert load_config(path, [f"model.memory={memory}", "data.mask_documents=false"]).model["memory"]["query_conv"] == 3


def test_load_optimizer_needs_a_path(tmp_path):
    path = write_config(tmp_path / "c.yaml", {"folder": "a"}, tmp_path / "run", run={"load_optimizer": True})
    with pytest.raises(ConfigError, match=r"'run\.load_optimizer' needs 'run\.load_path': the checkpoint that"):
        load_config(path)


def test_a_dry_run_shows_shares_and_passes(tmp_path, data_folder, capsys):
    sources = [{"folder": str(data_folder), "weight": 3}, {"folder": str(data_folder), "weight": 1}]
    path = write_config(tmp_path / "c.yaml", {"sources": sources}, tmp_path / "run", training={"max_steps": 64})
    print_dry_run(*resolve_dry_run(path))
    text = capsys.readouterr().out
    # 64 steps of 128 tokens: 6,144 and 2,048 of 4,096 tokens.
    assert "75.0%, 1.50 passes" in text
    assert "25.0%, 0.50 passes" in text
    assert "mixture_tokens: 8192" in text


def test_a_dry_run_goes_without_raw_files(tmp_path, capsys):
    data = {"files": [str(tmp_path / "absent*.npy")], "tokenizer": "absent.json"}
    path = write_config(tmp_path / "c.yaml", data, tmp_path / "run")
    print_dry_run(*resolve_dry_run(path, ["model.vocab_size=64"]))
    assert "The data are not prepared: there is no " + data["files"][0] in capsys.readouterr().out
