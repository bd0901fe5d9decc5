import json

import pytest

from ultramem.data.manifest import load_manifest
from ultramem.data.prepare import PrepareConfig, prepare
from ultramem.errors import DataError


@pytest.fixture
def data_folder(text_folder, tokenizer_folder, tmp_path):
    config = PrepareConfig((str(text_folder),), tokenizer=str(tokenizer_folder), max_part_tokens=400)
    prepare(config, tmp_path / "data")
    return tmp_path / "data"


def test_manifest_describes_the_folder(data_folder, monkeypatch):
    monkeypatch.chdir(data_folder.parent)
    manifest = load_manifest("data")
    assert manifest.folder == data_folder
    assert (manifest.dtype, manifest.vocab_size, manifest.eos_token_id, manifest.pad_token_id) == ("uint16", 300, 0, 1)
    assert manifest.tokenizer_folder == data_folder / "tokenizer"
    train = manifest.splits["train"]
    assert len(train.files) > 1
    assert all(file.is_absolute() and file.is_file() for file in train.files)
    assert [file.stat().st_size for file in train.files] == [2 * count for count in train.file_tokens]
    assert sum(train.file_tokens) == train.num_tokens
    assert train.bytes_per_token == train.num_bytes / train.num_tokens


def test_absent_folder(tmp_path):
    with pytest.raises(
        DataError, match=r"there is no data folder .*absent; make a data folder with: ultramem data prepare"
    ):
        load_manifest(tmp_path / "absent")


def test_folder_without_manifest(tmp_path):
    with pytest.raises(DataError, match=r"holds no manifest\.json and is no data folder; make a data folder with"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"manifest\.json is damaged .*remove the folder and prepare the data again"),
        ("[]", r"manifest\.json is no data manifest of format 1"),
        ('{"format": 2, "fingerprint": "x"}', r"manifest\.json is no data manifest of format 1"),
        ('{"format": 1, "fingerprint": "x"}', r"manifest\.json is incomplete or changed \(KeyError\('splits'\)\)"),
    ],
)
def test_damaged_manifest(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_manifest(tmp_path)


def test_counts_that_do_not_add_up(data_folder):
    path = data_folder / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["num_tokens"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"incomplete or changed .*the files of train do not add up to its"):
        load_manifest(data_folder)


def test_truncated_token_file(data_folder):
    file = data_folder / "train/part-00001.npy"
    file.write_bytes(file.read_bytes()[:-2])
    size = file.stat().st_size
    with pytest.raises(
        DataError, match=rf"part-00001\.npy has {size} bytes instead of the {size + 2} .*with --overwrite"
    ):
        load_manifest(data_folder)


def test_missing_token_file_or_tokenizer(data_folder):
    (data_folder / "tokenizer").rename(data_folder / "elsewhere")
    with pytest.raises(DataError, match=r"lacks its tokenizer/; prepare it again with --overwrite"):
        load_manifest(data_folder)
    (data_folder / "validation/part-00000.npy").unlink()
    with pytest.raises(
        DataError, match=r"the token file .*validation/part-00000\.npy is missing; prepare the data again"
    ):
        load_manifest(data_folder)
