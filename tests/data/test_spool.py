import random

import pytest

from sample_texts import make_documents, make_texts
from ultramem.data.documents import Document
from ultramem.data.spool import Spool
from ultramem.errors import DataError


@pytest.fixture
def split(tmp_path):
    """Split a list of documents; gives part → documents."""

    def run(documents, fraction=0.1, seed=0):
        spool = Spool(tmp_path / "spool", seed)
        for document in documents:
            spool.add(document)
        parts = {name: list(spool.read(offsets)) for name, offsets in spool.split(fraction).items()}
        spool.close()
        return parts

    return run


def texts(documents):
    return [document.text for document in documents]


def test_documents_come_back_whole(split):
    documents = [Document("é\n中\r\n\x00", 'a "b",\n', "s p", 3), *make_documents(make_texts(20))]
    parts = split(documents)
    assert list(parts) == ["train", "validation"]
    assert set(parts["train"]) | set(parts["validation"]) == set(documents)
    assert len(parts["train"]) + len(parts["validation"]) == 21


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.1, 10), (0.25, 25), (0.99, 99)])
def test_share_of_the_validation_part(split, fraction, count):
    assert len(split(make_documents(make_texts(100)), fraction)["validation"]) == count


def test_order_of_the_input_does_not_matter(split):
    documents = make_documents(make_texts(60))
    expected = split(documents)
    random.Random(1).shuffle(documents)
    assert split(documents) == expected
    assert texts(expected["train"]) != [text for text in make_texts(60) if text in texts(expected["train"])], "shuffled"


def test_seed_changes_split_and_order(split):
    documents = make_documents(make_texts(60))
    assert set(texts(split(documents, seed=0)["validation"])) != set(texts(split(documents, seed=1)["validation"]))


def test_a_document_moves_only_at_the_border_when_others_come(split):
    before = set(texts(split(make_documents(make_texts(500)), 0.1)["validation"]))
    after = set(texts(split(make_documents(make_texts(510)), 0.1)["validation"]))
    assert len(before - after) <= 10


def test_equal_texts_share_a_part(split):
    parts = split(make_documents(make_texts(20) * 5), 0.3)
    assert not set(texts(parts["train"])) & set(texts(parts["validation"]))
    assert len(parts["train"]) + len(parts["validation"]) == 100


def test_kept_documents_stay_in_train(split):
    kept = [Document(f"kept {text}", "k", "memory", 1, keep_in_train=True) for text in make_texts(50)]
    parts = split([*kept, *make_documents(make_texts(10))], 0.5)
    assert len(parts["validation"]) == 5, "half of those that may leave"
    assert not any(text.startswith("kept") for text in texts(parts["validation"]))


@pytest.mark.parametrize("documents", [make_documents(["same"] * 5), [Document("k", "k", "m", 1, True)] * 3])
def test_nothing_left_for_a_part(split, documents):
    with pytest.raises(
        DataError, match=r"corpus of \d documents cannot be divided.*too few different texts; give more"
    ):
        split(documents)


def test_half_a_surrogate_pair(split):
    with pytest.raises(DataError, match=r"memory, document 1: character 3 of the text is half of a surrogate pair"):
        split(make_documents(["bad\ud800"]))
