import pytest

from llm_surgeon.quantity import parse_quantity


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
    ],
)
def test_as_people_write_them(text, value):
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "much", "-3M", "0", "1.2.3M", "5 MX", "M"])
def test_what_is_no_quantity(text):
    with pytest.raises(ValueError, match="no positive number"):
        parse_quantity(text)
