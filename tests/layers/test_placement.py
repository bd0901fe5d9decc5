import pytest

from ultramem.errors import ConfigError
from ultramem.layers import Span, parse_placement


@pytest.mark.parametrize(
    ("placement", "spans"),
    [
        ("every", [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),
        ([3, 1], [(1, 1), (3, 3)]),
        ((4,), [(4, 4)]),
        ("0:1/2:3", [(0, 1), (2, 3)]),
        ("2:4/0:3", [(0, 3), (2, 4)]),
        ("1:4/1:2/1:1", [(1, 1), (1, 2), (1, 4)]),
        ("0:4", [(0, 4)]),
        ([2, 2], [(2, 2), (2, 2)]),
    ],
    ids=str,
)
def test_placements_are_spans_in_order(placement, spans):
    assert parse_placement(placement, 5) == [Span(*span) for span in spans]


def test_the_published_placement_is_read():
    published = "3:7/8:12/13:17/18:22/23:27/28:32"
    assert parse_placement(published, 34)[-1] == Span(28, 32)


ALLOWED = r'Allowed are "every", a list of blocks in 0…4, or spans such as "0:1/2:3"\.'


@pytest.mark.parametrize("placement", ["", "all", "1", "0:1:2", "0:1/", "a:b", "0-1", 3, ["1"], [1.0], [[0, 1]], None])
def test_what_cannot_be_read_is_named(placement):
    with pytest.raises(ConfigError) as caught:
        parse_placement(placement, 5)
    assert str(caught.value).startswith(f"memory.placement {placement!r} cannot be read. Allowed are")


@pytest.mark.parametrize(
    ("placement", "span"), [([5], "5:5"), ([-1], "-1:-1"), ("2:5", "2:5"), ("3:2", "3:2"), ("0:1/-1:0", "-1:0")]
)
def test_spans_outside_the_decoder_are_named(placement, span):
    with pytest.raises(ConfigError, match=rf"span {span} does not fit 5 blocks\. {ALLOWED}"):
        parse_placement(placement, 5)


def test_an_empty_placement_names_the_way_to_a_dense_model():
    with pytest.raises(ConfigError, match=r"memory\.placement is empty; use memory: null for a model without memory"):
        parse_placement([], 5)
