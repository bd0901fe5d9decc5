import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from sample_texts import make_texts
from ultramem.data import tokenizer as tokenizers
from ultramem.data.tokenizer import encode_texts, load_tokenizer, token_dtype, train_tokenizer, vocabulary_size
from ultramem.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def trained(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def test_trained_tokenizer_loads_with_auto_tokenizer(trained):
    assert len(trained) == 300
    assert trained.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|padding|>"]
    assert (trained.eos_token_id, trained.pad_token_id) == (0, 1)
    text = make_texts(60)[-1]
    assert len(trained(text)["input_ids"]) < 0.7 * len(text)
    assert trained.decode(trained(text)["input_ids"]) == text


@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back(trained, text):
    (ids,) = encode_texts(trained, [text])
    assert trained.decode(ids) == text


def test_blanks_and_punctuation_are_not_tidied(trained):
    text = " a  b , c . do n't\n\n\tx "
    assert trained.decode(trained(text)["input_ids"]) == text


def test_spelled_special_tokens_stay_text(trained):
    text = "<|endoftext|> is a word<|padding|>"
    (ids,) = encode_texts(trained, [text])
    assert not {0, 1} & set(ids)
    assert trained.decode(ids) == text
    assert trained("<|endoftext|>")["input_ids"] == [0], "the setting ends with the call"


def test_training_is_deterministic():
    texts = make_texts(80)
    first, second = (train_tokenizer(iter(texts), 320).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["train:257", "train:", "train:many", "train:-5", "train:4096.0"])
def test_bad_training_size(name):
    with pytest.raises(ConfigError, match=rf"tokenizer '{name}': train:N needs a whole number N of at least 258"):
        tokenizers.trained_vocabulary_size(name)


def test_training_size():
    assert tokenizers.trained_vocabulary_size("train:258") == 258
    assert tokenizers.trained_vocabulary_size("trained") is None


def test_more_tokens_than_the_corpus_gives():
    with pytest.raises(DataError, match=r"'train:4096': the corpus gives only 2\d\d tokens; ask for at most that many"):
        train_tokenizer(["a few words only"], 4096)


def test_smallest_trained_tokenizer_is_the_bytes():
    smallest = train_tokenizer(["text"], tokenizers.MINIMUM_TRAINED_VOCABULARY)
    (ids,) = encode_texts(smallest, ["中"])
    assert len(ids) == 3


def test_folder_and_bare_file_give_the_same(tokenizer_folder):
    from_folder = load_tokenizer(str(tokenizer_folder))
    from_file = load_tokenizer(str(tokenizer_folder / "tokenizer.json"))
    assert from_file.get_vocab() == from_folder.get_vocab()
    assert (from_file.eos_token_id, from_file.pad_token_id) == (from_folder.eos_token_id, from_folder.pad_token_id)


def write_word_tokenizer(path, *words):
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    backend.save(str(path))
    return str(path)


def test_end_of_text_is_found_or_named(tmp_path):
    name = write_word_tokenizer(tmp_path / "tokenizer.json", "unknown", "</s>", "STOP")
    assert load_tokenizer(name).eos_token == "</s>"
    named = load_tokenizer(name, eos_token="STOP")
    assert (named.eos_token_id, named.pad_token_id) == (2, 2), "padding falls back to the end of the text"


def test_missing_end_of_text(tmp_path):
    name = write_word_tokenizer(tmp_path / "tokenizer.json", "unknown", "word")
    with pytest.raises(DataError, match=r"names no end-of-text token.*name one of its 2 tokens with --eos-token"):
        load_tokenizer(name)
    with pytest.raises(DataError, match=r"there is no token 'STOP'; give --eos-token one that it has"):
        load_tokenizer(name, eos_token="STOP")


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json of the tokenizers library"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no tokenizer could be loaded from .*empty.*or train:N"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"there is no tokenizer file or folder './absent'; give a tokenizer folder"):
        load_tokenizer("./absent")

    def unreachable(name):
        raise OSError(f"We couldn't connect to load {name}\nCheck your connection")

    monkeypatch.setattr(tokenizers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(DataError, match=r"loaded from 'owner/name' \(We couldn't connect to load owner/name\); give a"):
        load_tokenizer("owner/name")


def test_slow_tokenizer_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizers.AutoTokenizer, "from_pretrained", lambda name: object())
    with pytest.raises(
        DataError, match=r"'owner/slow' is a object, without a fast form; give one with a tokenizer\.json"
    ):
        load_tokenizer("owner/slow")


def test_vocabulary_must_fit(trained):
    assert vocabulary_size(trained) == 300
    assert vocabulary_size(trained, 320) == 320
    with pytest.raises(DataError, match=r"has 300 tokens and does not fit --vocab-size 299; raise it to at least 300"):
        vocabulary_size(trained, 299)
    with pytest.raises(DataError, match=r"4,294,967,297 tokens does not fit 32-bit token files"):
        vocabulary_size(trained, 2**32 + 1)


@pytest.mark.parametrize(
    ("size", "dtype"), [(300, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (2**32, np.uint32)]
)
def test_token_dtype(size, dtype):
    assert token_dtype(size) == dtype
    assert token_dtype(size).newbyteorder("<") == token_dtype(size)
