import pytest

from llm_surgeon.recipe.quantity import LONGEST, MOST, closest, parse_quantity, shown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("90M", 90_000_000),
        ("1.5b", 1_500_000_000),
        ("7B", 7_000_000_000),
        ("300MiB", 300 * 2**20),
        ("2 GB", 2_000_000_000),
        ("0.5Gi", 2**29),
        ("12k", 12_000),
        (123, 123),
        ("4e8", 400_000_000),
        (1e16, 10**16),
        # As a 64-bit float it would be 123456789012345680.
        ("123456789012345678", 123456789012345678),
        ("1.1G", 1_100_000_000),
        (MOST, MOST),
    ],
)
def test_as_people_write_them(text, value):
    assert parse_quantity(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "much", "-3M", "0", "1.2.3M", "5 MX", "M", "0.4", "1:30", "1_000", True, -5, float("nan"), float("inf")],
)
def test_what_is_no_quantity(text):
    with pytest.raises(ValueError, match="no positive number"):
        parse_quantity(text)


@pytest.mark.parametrize("text", [10**5000, "9" * 5000, MOST + 1, "1e400", "1e9999k", 1e30, "1000000001G"], ids=shown)
def test_what_is_more_than_anything_has(text):
    with pytest.raises(ValueError, match=r"more than 10\^18"):
        parse_quantity(text)


@pytest.mark.parametrize("value", [0.5, "two words", None, True, [1, "a"], {"a": (1, 2)}, 10**30, float("nan")])
def test_short_values_are_shown_as_they_are(value):
    assert shown(value) == repr(value)


def test_long_values_are_cut_in_the_middle():
    text = shown("a" * 500 + "z" * 500)
    assert len(text) <= LONGEST
    assert text.startswith("'aaa")
    assert text.endswith("zzz'")
    assert "..." in text


def test_values_are_shown_without_looking_at_all_of_them():
    value = ["x"]
    for _ in range(100):
        value = [value] * 9  # 9^100 elements.
    assert len(shown(value)) <= LONGEST
    assert shown(10**5000) == "a number of about 5,001 digits"
    assert len(shown(dict.fromkeys(range(1000), "y" * 100))) <= LONGEST


def test_a_misspelt_word_is_like_one_of_the_choices_or_none():
    assert closest("Neurosn", ["heads", "neurons"]) == "neurons"
    assert closest("zebra", ["heads", "neurons"]) is None
    assert closest("x" * 10**6, ["heads"]) is None
