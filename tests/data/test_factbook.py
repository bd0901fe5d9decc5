import pytest

from ultramem.data import factbook
from ultramem.data.factbook import load_countries, plain_text, render_documents


@pytest.fixture(scope="module")
def countries():
    return {country.code: country for country in load_countries()}


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>One</p><p style='margin: 0'>Two</p>", "One\nTwo"),
        ("<br>a<br /><br>b  c&nbsp;d", "a\nb c d"),
        ("<strong>note:</strong> C&ocirc;te <em lang='fr'>d'Ivoire</em>", "note: Côte d'Ivoire"),
        ("Christian &lt;1.0%, x < 3 & y > 2", "Christian <1.0%, x < 3 & y > 2"),
        ("a<!--EndFragment -->b", "ab"),
        ("<p> </p>", ""),
    ],
)
def test_plain_text(markup, text):
    assert plain_text(markup) == text


def test_all_entries_are_read_with_distinct_names(countries):
    assert len(countries) == 256
    assert len({country.name for country in countries.values()}) == 256
    assert list(countries) == sorted(countries)
    names = {code: countries[code].name for code in ("ke", "ae", "ee", "xx", "cg", "iv", "sv", "dr")}
    assert names == {
        "ke": "Kenya",
        "ae": "United Arab Emirates",
        "ee": "European Union",
        "xx": "World",
        "cg": "Democratic Republic of the Congo",
        "iv": "Côte d'Ivoire",
        "sv": "Svalbard",
        "dr": "Dominican Republic",
    }


def test_no_markup_is_left(countries):
    text = "\n".join(field.text for country in countries.values() for field in country.fields)
    for mark in ("<br", "<p", "</", "<strong", "&nbsp;", "&amp;", "&eacute;", "\xa0", "  ", "\n\n"):
        assert mark not in text, mark
    assert all(field.text.strip() == field.text and field.text for c in countries.values() for field in c.fields)


def test_labels_are_not_repeated(countries):
    kenya = countries["ke"]
    assert kenya.text_of("Economy", "Real GDP per capita 2024") == "$5,800 (2024 est.)"
    assert kenya.text_of("Geography", "Land use / agricultural land: arable land") == "11.4% (2023 est.)"
    assert kenya.text_of("People and Society", "Languages").startswith("English (official), Kiswahili (official)")
    assert kenya.text_of("Government", "Capital / name") == "Nairobi"
    assert kenya.text_of("Government", "Absent") is None


def test_text_that_two_sections_share_stands_once(countries):
    labels = [(field.label, field.text) for field in countries["ke"].fields]
    assert len(labels) == len(set(labels))
    assert countries["ke"].text_of("Environment", "Land use / forest") is None


def test_notes_that_explain_a_statistic_are_left_out(countries):
    notes = [field.text for country in countries.values() for field in country.fields if field.label.endswith("note")]
    assert "top five export partners based on percentage share of exports" not in notes
    assert any("KSA's predecessor" in note for note in notes)


def test_documents_name_the_country_on_every_labelled_line():
    capital = ("Government", "Capital / name")
    documents = {identifier: (text, is_key) for identifier, text, is_key in render_documents({capital})}
    assert documents["ke/Key facts"] == ("Kenya / Key facts\nKenya / Capital / name: Nairobi", True)
    text, is_key = documents["ke/Geography"]
    assert not is_key
    lines = text.splitlines()
    assert lines[:2] == [
        "Kenya / Geography",
        "Kenya / Location: Eastern Africa, bordering the Indian Ocean, between Somalia and Tanzania",
    ]
    assert "ay/Key facts" not in documents, "Antarctica has no capital, so no document of it is empty"
    assert sum(line.startswith("Kenya / ") for line in lines) > 0.9 * len(lines)


def test_every_field_is_in_exactly_one_document(countries):
    capital = ("Government", "Capital / name")
    num_lines = sum(text.count(" / ") > 0 and len(text.splitlines()) - 1 for _, text, _ in render_documents({capital}))
    num_expected = sum(len(field.text.splitlines()) for country in countries.values() for field in country.fields)
    assert num_lines == num_expected


def test_package_version_is_the_pinned_one():
    from importlib import metadata

    assert metadata.version(factbook.DISTRIBUTION) == factbook.VERSION
