import gzip
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from sample_texts import make_texts, run
from ultramem.data.corpora import iterate_documents
from ultramem.data.manifest import DataManifest
from ultramem.data.prepare import PrepareConfig
from ultramem.errors import ConfigError, DataError


def read_tokens(manifest: DataManifest, split: str) -> np.ndarray:
    return np.concatenate([np.fromfile(file, dtype=manifest.dtype) for file in manifest.splits[split].files])


def read_documents(manifest: DataManifest, split: str) -> list[str]:
    """Decoded documents of a part."""
    tokenizer = AutoTokenizer.from_pretrained(manifest.tokenizer_folder)
    tokens = read_tokens(manifest, split)
    ends = np.flatnonzero(tokens == manifest.eos_token_id)
    assert ends[-1] == len(tokens) - 1, "the last document is ended too"
    return [tokenizer.decode(ids[:-1].tolist()) for ids in np.split(tokens, ends + 1)[:-1]]


def test_every_document_is_in_exactly_one_part(tmp_path, text_folder):
    manifest = run(tmp_path / "data", [text_folder], validation_fraction=0.1)
    train, validation = (read_documents(manifest, split) for split in ("train", "validation"))
    assert len(validation) == 4
    assert sorted(train + validation) == sorted(make_texts(40))
    for split, texts in (("train", train), ("validation", validation)):
        assert manifest.splits[split].num_documents == len(texts)
        assert manifest.splits[split].num_bytes == sum(len(text.encode()) for text in texts)
        assert manifest.splits[split].num_tokens == len(read_tokens(manifest, split))
    assert sorted(path.name for path in manifest.folder.iterdir()) == [
        "manifest.json",
        "tokenizer",
        "train",
        "validation",
    ]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=2, max_size=8, unique=True),
    data=st.data(),
)
def test_decoding_gives_back_the_documents(tmp_path_factory, tokenizer_folder, texts, data):
    folder = tmp_path_factory.mktemp("any")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{text}!"}) + "\n" for text in texts), encoding="utf-8")
    fraction = data.draw(st.floats(0.01, 0.5))
    manifest = run(folder / "data", [rows], tokenizer_folder, validation_fraction=fraction, max_part_tokens=2000)
    documents = [text for split in ("train", "validation") for text in read_documents(manifest, split)]
    assert sorted(documents) == sorted(f"{text}!" for text in texts)


def test_metadata_points_at_the_documents(tmp_path, text_folder):
    manifest = run(tmp_path / "data", [text_folder], max_part_tokens=200)
    tokenizer = AutoTokenizer.from_pretrained(manifest.tokenizer_folder)
    assert len(manifest.splits["train"].files) > 2
    num_rows = 0
    for file in manifest.splits["train"].files:
        tokens = np.fromfile(file, dtype=manifest.dtype)
        assert len(tokens) <= 200
        with gzip.open(file.with_suffix(".csv.gz"), "rt") as stream:
            for line in stream:
                start, end, name, source, location = line.strip().split(",")
                text = tokenizer.decode(tokens[int(start) : int(end) - 1].tolist())
                assert text == (text_folder / name).read_text()
                assert tokens[int(end) - 1] == manifest.eos_token_id
                assert (source, location) == (str(text_folder / name), "1")
                num_rows += 1
    assert num_rows == manifest.splits["train"].num_documents


def test_same_input_gives_the_same_fingerprint_and_files(tmp_path, text_folder):
    one, two = (run(tmp_path / name, [text_folder]) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    for file in one.splits["train"].files:
        assert file.read_bytes() == (two.folder / file.relative_to(one.folder)).read_bytes()


def test_fingerprint_ignores_the_order_of_sources_and_follows_everything_else(tmp_path, text_folder, tokenizer_folder):
    (tmp_path / "more.txt").write_text("one more text of the sea")
    sources = [text_folder, tmp_path / "more.txt"]
    first = run(tmp_path / "first", sources, tokenizer_folder)
    assert run(tmp_path / "swapped", sources[::-1], tokenizer_folder).fingerprint == first.fingerprint
    others = [
        run(tmp_path / "fewer", [text_folder], tokenizer_folder),
        run(tmp_path / "seed", sources, tokenizer_folder, seed=1),
        run(tmp_path / "fraction", sources, tokenizer_folder, validation_fraction=0.2),
        run(tmp_path / "tokenizer", sources, "train:310"),
        run(tmp_path / "size", sources, tokenizer_folder, vocab_size=512),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_trained_tokenizer_has_not_seen_the_validation_part(tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = [f"{text} {'zyxwvut' * 30 if place == 3 else ''}" for place, text in enumerate(make_texts(60))]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    in_validation = {}
    for seed in range(60):
        manifest = run(tmp_path / f"seed{seed}", [rows], seed=seed, validation_fraction=0.4)
        vocabulary = AutoTokenizer.from_pretrained(manifest.tokenizer_folder).get_vocab()
        in_validation[any("zyxwvut" in text for text in read_documents(manifest, "validation"))] = any(
            "zyx" in token for token in vocabulary
        )
        if len(in_validation) == 2:
            break
    assert in_validation == {True: False, False: True}


def test_large_vocabulary_makes_32_bit_files(tmp_path):
    words = [f"w{number}" for number in range(70_000)]
    backend = Tokenizer(
        models.WordLevel({"</s>": 0} | {word: place for place, word in enumerate(words, start=1)}, "</s>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "w69999 w1"}\n{"text": "w69998"}\n')
    manifest = run(tmp_path / "data", [rows], tmp_path / "tokenizer.json")
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_001)
    tokens = sorted(read_tokens(manifest, "train").tolist() + read_tokens(manifest, "validation").tolist())
    assert tokens == [0, 0, 2, 69_999, 70_000]


def test_vocabulary_that_does_not_fit(tmp_path, text_folder, tokenizer_folder):
    with pytest.raises(DataError, match=r"has 300 tokens and does not fit --vocab-size 256; raise it to at least 300"):
        run(tmp_path / "data", [text_folder], tokenizer_folder, vocab_size=256)
    assert not list(tmp_path.glob("data*"))
    assert run(tmp_path / "data", [text_folder], tokenizer_folder, vocab_size=384).vocab_size == 384


def test_single_text_is_cut_near_its_end(tmp_path, tokenizer_folder):
    text = "\n".join(make_texts(100))
    (tmp_path / "book.txt").write_text(text)
    manifest = run(tmp_path / "data", [tmp_path / "book.txt"], tokenizer_folder, validation_fraction=0.1)
    (head,), (tail,) = (read_documents(manifest, split) for split in ("train", "validation"))
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.09 * len(text) < len(tail) < 0.12 * len(text)


def test_single_text_without_lines_or_blanks(tmp_path, tokenizer_folder):
    (tmp_path / "book.txt").write_text("x" * 100)
    manifest = run(tmp_path / "data", [tmp_path / "book.txt"], tokenizer_folder, validation_fraction=0.1)
    assert read_documents(manifest, "validation") == ["x" * 10]


def test_single_text_that_is_too_short(tmp_path, tokenizer_folder):
    (tmp_path / "book.txt").write_text("x")
    with pytest.raises(DataError, match=r"book\.txt: the only document is too short \(1 characters\) to divide"):
        run(tmp_path / "data", [tmp_path / "book.txt"], tokenizer_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "no source given; name at least one file, folder, data set or named corpus"),
        ({"validation_fraction": 0.0}, "--validation-fraction 0 must be above 0 and below 1"),
        ({"validation_fraction": 1.5}, r"--validation-fraction 1\.5 must be above 0 and below 1"),
        ({"max_part_tokens": 0}, "--max-part-tokens 0 must be at least 1"),
        ({"tokenizer": "train:100"}, "train:N needs a whole number N of at least 258"),
        ({"tokenizer": "train:4096", "vocab_size": 1024}, r"'train:4096' does not fit --vocab-size 1,024"),
        (
            {"tokenizer": "train:4096", "eos_token": "</s>"},
            "--eos-token is for existing tokenizers; 'train:4096' brings",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**{"sources": ("a",), **options})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b""}, r"a\.txt holds no text"),
        ({"a.txt": b"ok", "b.txt": b"caf\xe9"}, r"b\.txt: byte 0xe9 at offset 3 is not UTF-8"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": 3}\n'}, r"a\.jsonl, line 2: field 'text' holds a int"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": "\\ud800"}\n'}, r"a\.jsonl, document 2: character 0 .*surrogate pair"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, tokenizer_folder, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "data", [tmp_path / name for name in files], tokenizer_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_facts_of_the_factbook_are_in_the_training_part(tmp_path, monkeypatch, tokenizer_folder):
    from ultramem.data.corpora import NAMED_CORPORA
    from ultramem.data.facts import load_facts

    african = [
        document for document in iterate_documents(["factbook"]) if document.identifier[:2] in ("ke", "et", "ni")
    ]
    monkeypatch.setitem(NAMED_CORPORA, "factbook", lambda: iter(african))
    manifest = run(tmp_path / "data", ["factbook"], tokenizer_folder, validation_fraction=0.9)
    train = read_documents(manifest, "train")
    assert len(train) < len(african) / 4
    facts = [fact for fact in load_facts() if fact.subject in ("Kenya", "Ethiopia", "Nigeria")]
    assert len(facts) > 40
    for fact in facts:
        assert any(text.startswith(f"{fact.subject} / Key facts") and fact.answer in text for text in train), fact


def test_olmo_core_reads_the_files(tmp_path, text_folder, tokenizer_folder):
    from olmo_core.data import NumpyFSLDatasetConfig, TokenizerConfig
    from olmo_core.data.utils import iter_document_indices

    manifest = run(tmp_path / "data", [text_folder], tokenizer_folder, max_part_tokens=300)
    files = manifest.splits["train"].files
    tokenizer = TokenizerConfig(manifest.vocab_size, manifest.eos_token_id, manifest.pad_token_id)
    config = NumpyFSLDatasetConfig(
        tokenizer=tokenizer,
        paths=[str(file) for file in files],
        sequence_length=16,
        work_dir=str(tmp_path / "work"),
        dtype=manifest.dtype,
    )
    dataset = config.build()
    dataset.prepare()
    assert len(dataset) == sum(count // 16 for count in manifest.splits["train"].file_tokens)
    read = np.concatenate([dataset[place]["input_ids"].numpy() for place in range(len(dataset))])
    expected = [np.fromfile(file, "<u2") for file in files]
    np.testing.assert_array_equal(read, np.concatenate([ids[: len(ids) // 16 * 16] for ids in expected]))
    for file in files:
        by_metadata = list(iter_document_indices(file, use_array_if_local=False, dtype=np.uint16))
        by_tokens = list(iter_document_indices(file, eos_token_id=manifest.eos_token_id, dtype=np.uint16))
        assert by_metadata == [(int(start), int(end)) for start, end in by_tokens]
        assert by_metadata


@pytest.mark.slow
def test_both_named_corpora_with_a_trained_tokenizer(tmp_path):
    manifest = run(tmp_path / "data", ["factbook", "wikipedia-leads"], "train:4096")
    assert manifest.splits["train"].num_bytes > 12_000_000
    assert manifest.splits["validation"].num_documents > 200
    assert 3.2 < manifest.splits["train"].bytes_per_token < 3.8
    decoded = read_documents(manifest, "train") + read_documents(manifest, "validation")
    assert sorted(decoded) == sorted(document.text for document in iterate_documents(["factbook", "wikipedia-leads"]))
