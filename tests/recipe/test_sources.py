"""Sources of a text in a recipe: shares, and the sequences that each gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_surgeon import PruneConfig
from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.config import read_recipe
from llm_surgeon.recipe.sources import Source, allotted, sources_of


@pytest.mark.parametrize(
    ("given", "texts", "shares"),
    [
        (("a.txt:0.7", "b.jsonl:0.3"), ["a.txt", "b.jsonl"], [0.7, 0.3]),
        (("a.txt:70%", "b.jsonl:30%"), ["a.txt", "b.jsonl"], [0.7, 0.3]),
        (("a:3", "b:1"), ["a", "b"], [0.75, 0.25]),
        (("a: 75 %", "b:25 %"), ["a", "b"], [0.75, 0.25]),
        (("a:3e-1", "b:1e-1"), ["a", "b"], [0.75, 0.25]),
        (("crawl:2020:1", "crawl:2021:1"), ["crawl:2020", "crawl:2021"], [0.5, 0.5]),
        (("a", "b", "c"), ["a", "b", "c"], [1 / 3] * 3),
        (("org/data:config:train:.5", "C:\\text.txt:1.5"), ["org/data:config:train", "C:\\text.txt"], [0.25, 0.75]),
        (("rows.jsonl#answer:1", "rows.jsonl#question:1"), ["rows.jsonl#answer", "rows.jsonl#question"], [0.5, 0.5]),
    ],
)
def test_shares_are_in_proportion(given, texts, shares):
    found = sources_of(given)
    assert [source.text for source in found] == texts
    assert [source.share for source in found] == pytest.approx(shares)


def test_the_name_of_one_text_is_never_taken_apart():
    assert sources_of(("data:3",)) == (Source("data:3", 1.0),)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a:0.5", "b"], "'b' without a share"),
        (["a:0", "b:1"], "the share 0: shares are positive"),
        (["a:-1", "b:1"], "the share -1"),
        (["a", "b", "a"], "'a' twice"),
        (["a:1", "a:2"], "'a' twice, as 'a:2' is read as a text and its share"),
        (["a", "none"], "none beside other texts"),
        ([], "at least"),
        (["a", ""], "has to be text"),
        (["a", 3], "has to be text"),
    ],
)
@pytest.mark.parametrize("option", ["calibration", "evaluation"])
def test_mistakes_are_named_before_anything_is_read(option, given, said):
    with pytest.raises(ConfigError, match=said) as caught:
        PruneConfig.from_mapping({option: given})
    assert f"--{option}" in str(caught.value)


def test_recipes_keep_one_text_as_text_and_several_as_a_list(tmp_path):
    one = PruneConfig(calibration="a.txt", evaluation=["b.txt"])
    assert (one.resolved()["calibration"], one.resolved()["evaluation"]) == ("a.txt", "b.txt")
    assert one == PruneConfig(calibration=["a.txt"], evaluation="b.txt")
    several = PruneConfig(calibration=["a.txt:2", "b.txt:1"])
    (tmp_path / "recipe.yaml").write_text(several.to_yaml())
    assert PruneConfig.from_mapping(read_recipe(tmp_path / "recipe.yaml")).calibration == several.calibration
    assert several.resolved()["calibration"] == ["a.txt:2", "b.txt:1"]
    assert several.evaluates
    assert not PruneConfig(evaluation="none").evaluates


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(1, 1000))
def test_counts_add_up_and_are_nearest_to_the_shares(parts, total):
    sources = tuple(Source(str(number), part / sum(parts)) for number, part in enumerate(parts))
    counts = allotted(sources, total)
    assert sum(counts) == total
    assert all(abs(count - source.share * total) < 1 + 1e-6 for count, source in zip(counts, sources, strict=True))


def test_exact_shares_are_kept_exactly():
    assert allotted((Source("a", 0.7), Source("b", 0.3)), 10) == [7, 3]
    assert allotted((Source("a", 1 / 3), Source("b", 1 / 3), Source("c", 1 / 3)), 9) == [3, 3, 3]
