"""Sources: data folders and raw token files that fit together, and what is said where they do not."""

import json
import shutil

import numpy as np
import pytest

from tiny_sources import pattern_tokens, raw_settings, write_raw
from tiny_training import write_data_folder
from ultramem.data.manifest import load_manifest
from ultramem.data.sources import SourceSpec, are_present, expand_patterns, load_sources
from ultramem.errors import DataError


@pytest.fixture
def folder(tmp_path):
    return write_data_folder(tmp_path / "prepared")


def test_a_single_folder_is_what_its_manifest_says(folder):
    assert load_sources([SourceSpec(str(folder))], raw_settings(folder)) == load_manifest(folder)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_raw_files_are_described_by_the_settings(tmp_path, folder, dtype):
    for i in range(2):
        write_raw(tmp_path / "raw", pattern_tokens(100 + i), dtype, name=f"part-{i}-00000.npy")
    spec = SourceSpec(files=(str(tmp_path / "raw" / "part-*.npy"),))
    manifest = load_sources([spec], raw_settings(folder, dtype=dtype))
    assert (manifest.dtype, manifest.vocab_size, manifest.eos_token_id, manifest.pad_token_id) == (dtype, 64, 0, 1)
    train = manifest.splits["train"]
    assert [file.name for file in train.files] == ["part-0-00000.npy", "part-1-00000.npy"]
    assert (train.file_tokens, train.num_tokens, train.bytes_per_token) == ((100, 101), 201, None)
    assert "validation" not in manifest.splits
    assert manifest.mixture == ()
    assert manifest.tokenizer_path == folder / "tokenizer" / "tokenizer.json"


def test_type_and_special_tokens_default_to_the_tokenizers(tmp_path, folder):
    file = write_raw(tmp_path, pattern_tokens(100))
    settings = raw_settings(folder, eos_token_id=None, pad_token_id=None, tokenizer=str(folder / "tokenizer"))
    manifest = load_sources([SourceSpec(files=(str(file),))], settings)
    assert (manifest.dtype, manifest.eos_token_id, manifest.pad_token_id) == ("uint16", 0, 1)


def test_validation_is_that_of_folders_and_of_named_files(tmp_path, folder):
    file, held_out = write_raw(tmp_path / "a", pattern_tokens(100)), write_raw(tmp_path / "b", pattern_tokens(60))
    specs = [SourceSpec(str(folder), weight=3.0), SourceSpec(files=(str(file),))]
    manifest = load_sources(specs, raw_settings(folder, validation_files=(str(held_out),)))
    assert manifest.splits["validation"].file_tokens == (200, 60)
    assert manifest.splits["validation"].bytes_per_token is None
    only_folders = load_sources(specs, raw_settings(folder)).splits["validation"]
    assert (only_folders.file_tokens, only_folders.bytes_per_token) == ((200,), 4)


def test_weights_are_shares(tmp_path, folder):
    file = write_raw(tmp_path, pattern_tokens(100))
    specs = [SourceSpec(str(folder), weight=3.0), SourceSpec(files=(str(file),), weight=1.0)]
    manifest = load_sources(specs, raw_settings(folder))
    assert [source.weight for source in manifest.mixture] == [0.75, 0.25]
    assert [source.num_tokens for source in manifest.mixture] == [4096, 100]


def test_the_fingerprint_follows_every_source(tmp_path, folder):
    tokens = pattern_tokens(100_000)
    file = write_raw(tmp_path / "raw", tokens)
    specs = [SourceSpec(str(folder), weight=3.0), SourceSpec(files=(str(file),), weight=1.0)]
    settings = raw_settings(folder)
    first = load_sources(specs, settings).fingerprint
    assert load_sources(specs, settings).fingerprint == first
    other_weight = [specs[0], SourceSpec(files=(str(file),), weight=2.0)]
    prints = {first, load_sources(other_weight, settings).fingerprint, load_sources(specs[::-1], settings).fingerprint}
    prints.add(load_sources(specs[1:], settings).fingerprint)
    tokens[-1] += 1
    write_raw(tmp_path / "raw", tokens)
    prints.add(load_sources(specs, settings).fingerprint)
    write_raw(tmp_path / "raw", tokens[:-10])
    prints.add(load_sources(specs, settings).fingerprint)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"fingerprint": "changed"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    prints.add(load_sources(specs, settings).fingerprint)
    assert len(prints) == 7


def test_a_moved_source_keeps_its_fingerprint(tmp_path, folder):
    write_raw(tmp_path / "raw", pattern_tokens(100))

    def fingerprint(place):
        specs = [SourceSpec(str(place / "prepared")), SourceSpec(files=(str(place / "raw" / "*.npy"),))]
        return load_sources(specs, raw_settings(folder)).fingerprint

    before = fingerprint(tmp_path)
    shutil.copytree(tmp_path / "prepared", tmp_path / "moved" / "prepared")
    shutil.copytree(tmp_path / "raw", tmp_path / "moved" / "raw")
    assert fingerprint(tmp_path / "moved") == before


def npy_file(path):
    np.save(path, np.arange(20, dtype=np.uint16))


def cut_file(path):
    path.write_bytes(pattern_tokens(20).astype("<u2").tobytes()[:-1])


def wide_file(path):
    pattern_tokens(20).astype("<u4").tofile(path)


def foreign_file(path):
    np.full(20, 64, "<u2").tofile(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            cut_file,
            r"has 39 bytes, not a multiple of the 2 of a uint16 token: it is cut short\. Copy or tokenize it ag",
        ),
        (npy_file, r"is in NumPy's own format; token files are raw ids without a header"),
        (wide_file, r"every second token of .* is 0: it holds uint32 ids\. Set 'data\.dtype: uint32'"),
        (foreign_file, r"holds the token 64, but the tokenizer has only 64 tokens: it was made with another tokenizer"),
    ],
)
@pytest.mark.parametrize("is_validation", [False, True])
def test_a_file_that_is_no_token_file(tmp_path, folder, write, message, is_validation):
    good, bad = write_raw(tmp_path, pattern_tokens(20)), tmp_path / "bad.npy"
    write(bad)
    files = (str(good),) if is_validation else (str(good), str(bad))
    settings = raw_settings(folder, validation_files=(str(bad),) if is_validation else ())
    with pytest.raises(DataError, match=message):
        load_sources([SourceSpec(files=files)], settings)


def test_a_pattern_without_files(tmp_path, folder):
    with pytest.raises(DataError, match=r"no token file matches '.*/part-\*\.npy': give headerless \.npy files"):
        expand_patterns([str(tmp_path / "part-*.npy")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, r"raw token files need 'data\.tokenizer'"),
        (
            {"tokenizer": "nowhere.json"},
            r"there is no tokenizer file or folder 'nowhere\.json'; give a tokenizer folder",
        ),
        ({"eos_token_id": 64}, r"has no token 64, given as eos_token_id: its ids are 0 to 63"),
        ({"pad_token_id": -1}, r"has no token -1, given as pad_token_id"),
    ],
)
def test_settings_of_raw_files_that_do_not_fit(tmp_path, folder, changes, message):
    file = write_raw(tmp_path, pattern_tokens(20))
    with pytest.raises(DataError, match=message):
        load_sources([SourceSpec(files=(str(file),))], raw_settings(folder, **changes))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dtype", "uint32", r"do not fit together: dtype is uint16 in one and uint32 in the other\. Prepare both with"),
        ("vocab_size", 65, r"vocab_size is 64 in one and 65 in the other"),
        ("eos_token_id", 5, r"eos_token_id is 0 in one and 5 in the other"),
        ("tokenizer", None, r"were made with different tokenizers\. Prepare both with the same one"),
    ],
)
def test_folders_that_do_not_fit_together(tmp_path, folder, key, value, message):
    other = write_data_folder(tmp_path / "other")
    if key == "tokenizer":
        tokenizer = json.loads((other / "tokenizer" / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["w5"], vocabulary["w6"] = vocabulary["w6"], vocabulary["w5"]
        (other / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        manifest = json.loads((other / "manifest.json").read_text()) | {key: value}
        (other / "manifest.json").write_text(json.dumps(manifest))
    if value == "uint32":
        for file in other.rglob("*.npy"):
            np.fromfile(file, "<u2").astype("<u4").tofile(file)
    with pytest.raises(DataError, match=message):
        load_sources([SourceSpec(str(folder)), SourceSpec(str(other))], raw_settings(folder))


def test_settings_that_contradict_a_folder(tmp_path, folder):
    file = write_raw(tmp_path, pattern_tokens(20))
    specs = [SourceSpec(str(folder)), SourceSpec(files=(str(file),))]
    with pytest.raises(DataError, match=r"'data\.dtype' is uint32, but .*prepared has uint16: leave the key out"):
        load_sources(specs, raw_settings(folder, dtype="uint32"))


def test_whether_sources_are_present(tmp_path, folder):
    write_raw(tmp_path / "raw", [2, 3])
    here, missing = SourceSpec(files=(str(tmp_path / "raw" / "*.npy"),)), SourceSpec(files=(str(tmp_path / "x*.npy"),))
    assert are_present([SourceSpec(str(folder)), here])
    assert not are_present([here, missing])
    assert not are_present([SourceSpec(str(tmp_path / "absent"))])
