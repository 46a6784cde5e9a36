import os

import pytest
import yaml

from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.config import PruneConfig, read_recipe
from llm_surgeon.recipe.file import MOST_BYTES, MOST_VALUES, read_mapping, with_underscores
from llm_surgeon.recipe.quantity import shown


@pytest.fixture
def read(tmp_path):
    """Reads a recipe of the content given."""

    def read(content):
        (tmp_path / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_recipe(tmp_path / "recipe.yaml")

    return read


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("structure: 2:4", {"structure": "2:4"}),
        ("structure: [4:8, neurons]", {"structure": ["4:8", "neurons"]}),
        ("fisher: true", {"fisher": "true"}),
        ("target-params: 90M", {"target_params": "90M"}),
        ("target-params: 9", {"target_params": 9}),
        ("calibration: 2024-01-01", {"calibration": "2024-01-01"}),
        ("calibration: 1e5", {"calibration": "1e5"}),
        ("evaluation: no", {"evaluation": "no"}),
        ("evaluation: none", {"evaluation": "none"}),
        ("evaluation: ~", {"evaluation": None}),
        ("evaluation: 'null'", {"evaluation": "null"}),
        ("ignore: [1:2, true, 7]", {"ignore": ["1:2", "true", "7"]}),
    ],
)
def test_options_of_text_are_taken_as_they_are_written(read, content, options):
    assert read(content) == options


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *(("true", True), ("False", False), ("TRUE", True), ("~", None), ("", None), ("null", None)),
        *(("yes", "yes"), ("on", "on"), ("N", "N"), ("'true'", "true"), ('"5"', "5"), ("|-\n  5", "5")),
        *(("5", 5), ("-5", -5), ("+5", 5), ("010", 10), ("0o17", "0o17"), ("0x1f", "0x1f"), ("0b11", "0b11")),
        *(("1_000", "1_000"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("2024-01-01", "2024-01-01"), ("=", "=")),
        *(("5.0", 5.0), (".5", 0.5), ("5.", 5.0), ("1e-4", 1e-4), ("-1.5E+3", -1500.0), ("1e400", float("inf"))),
        *((".inf", float("inf")), ("-.INF", -float("inf")), ("5%", "5%"), ("9" * 1001, "9" * 1001)),
    ],
    ids=shown,
)
def test_other_values_are_those_of_yaml_1_2(read, written, value):
    found = read(f"samples: {written}\n")["samples"]
    assert (found, type(found)) == (value, type(value))


def test_not_a_number_is_one(read):
    assert str(read("sparsity: .nan")["sparsity"]) == "nan"


def test_variants_are_read_as_recipes_are(read):
    recipe = """
    structure: [2:4, 4:8]
    variants:
      true: {fisher: true, permute: true}
      cross-fit: {cross-fit: true, scope: row}
      1_0: {samples: yes}
    """
    assert read(recipe) == {
        "structure": ["2:4", "4:8"],
        "variants": {
            "true": {"fisher": "true", "permute": True},
            "cross-fit": {"cross-fit": True, "scope": "row"},
            "1_0": {"samples": "yes"},
        },
    }


def test_mappings_may_take_over_others(read):
    recipe = """
    variants:
      a: &a {seed: 1, samples: 5}
      b: {<<: *a, samples: 6}
      c: {samples: 7, <<: [{seed: 9, shots: 2}, *a]}
      d: {"<<": 3}
    """
    assert read(recipe)["variants"] == {
        "a": {"seed": 1, "samples": 5},
        "b": {"seed": 1, "samples": 6},
        "c": {"seed": 9, "shots": 2, "samples": 7},
        "d": {"<<": 3},
    }


def test_every_resolved_recipe_is_read_as_it_was_written(tmp_path):
    config = PruneConfig(
        structure="2:4",
        fisher="true",
        calibration="1_000",
        evaluation="null",
        ignore=("yes", "1:30", "2024-01-01", "~", "lm_head"),
        dampening_a=1e-7,
        dampening_g=1e20,
        device_memory="24GiB",
        seed=2**63 - 1,
    )
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    assert PruneConfig.from_mapping(read_recipe(tmp_path / "recipe.yaml")).resolved() == config.resolved()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("samples: 3\nseed: 1\nsamples: 4", r"line 3: 'samples' is there for the second time, after line 1"),
        ("variants:\n  a:\n    seed: 1\n    seed: 1", r"line 4: 'seed' is there for the second time, after line 3"),
        ("variants:\n  a: {}\n  'a': {}", r"line 3: 'a' is there for the second time"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", r"line 2: '<<' is there for the second time"),
        ("seq-len: 3\nseq_len: 4", "'seq_len' twice, with hyphens and without"),
    ],
)
def test_an_option_given_twice_is_refused(read, content, message):
    with pytest.raises(ConfigError, match=message):
        read(content)


def test_names_of_variants_keep_their_hyphens():
    assert with_underscores({"a-b": {"c-d": 1}}) == {"a_b": {"c-d": 1}}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "more than 10,000 values"),
        (BOMB.replace("[x,x,x,x,x,x,x,x,x]", "{x: 1}").replace("[*", "{<<: [*").replace("]", "]}"), "more than 10,000"),
        (f"a: [{'x,' * MOST_VALUES}]", "more than 10,000 values"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: " + "[" * 40_000, "nested too deeply"),
        ("{" * 40_000, "nested too deeply"),
        ("- " * 40_000, "nested too deeply"),
        ("x" * (MOST_BYTES + 1), "more than 100,000 bytes"),
        (b"\0\1\2", "unacceptable character"),
        (b"\x80\x04K\x01.", "no UTF-8 text"),
        ("samples: 3".encode("utf-16"), "no UTF-8 text"),
        ("a: *b", "line 1: found undefined alias 'b'"),
        ("x: 1\na: [1", "line 2: "),
        ("a: 1\n---\nb: 1", "another document"),
        ("a:\n\t- b", "line 2: "),
        ("? [a, b]\n: 3", "line 1: a key is no word"),
        ("? {a: b}\n: 3", "line 1: a key is no word"),
        ("a: 1\n<<: 3", "line 2: what << takes over is no mapping"),
        ("samples: !!int '3'", "line 1: the tag .*int' is not for recipes"),
        ("samples: !!bool x", "is not for recipes"),
        ("samples: !!timestamp x", "is not for recipes"),
        ("samples: !!python/object/apply:os.getcwd []", "is not for recipes"),
        ("a: !!set {b}", "is not for recipes"),
        (r'a: "\UFFFFFFFF"', "cannot be read"),
        ("a: *" + "b" * 10_000, "cannot be read"),
        ("- a\n- list\n", "is not a mapping"),
        ("words", "is not a mapping"),
    ],
    ids=shown,
)
def test_what_is_no_recipe_is_refused_at_once_and_in_few_words(read, content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(content)
    assert "recipe.yaml" in caught.value.cause
    assert "\n" not in caught.value.cause
    assert len(caught.value.cause) < 500


def test_the_largest_recipe_is_read(read):
    assert len(read("ignore: [" + ", ".join(["x"] * (MOST_VALUES - 2)) + "]")["ignore"]) == MOST_VALUES - 2


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_no_part_of_a_recipe(read):
    assert read(b"\xef\xbb\xbfsamples: 3\r\nfisher: true\r\n") == {"samples": 3, "fisher": "true"}


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name, message in {
        ".": "it is a folder",
        "pipe": "no regular file",
        "zeros": "no regular file",
        "gone": "No such file",
        "x" * 5000: "too long",
        "a\0b": "null byte",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read_recipe(tmp_path / name)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("samples: 3")

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", fail)
    with pytest.raises(ConfigError, match=r"recipe\.yaml cannot be read: Permission denied"):
        read_recipe(tmp_path / "recipe.yaml")


def test_which_options_take_text_is_up_to_the_caller(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a-b: true\nc: true\n")
    assert read_mapping(tmp_path / "recipe.yaml", {"a_b"}) == {"a_b": "true", "c": True}


def test_other_readers_of_yaml_read_as_before(read):
    read("samples: yes")
    assert yaml.safe_load("samples: yes") == {"samples": True}
