"""Corpora from files, from the hub (replaced) and their split. Nothing here uses the network."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_surgeon.data import corpora
from llm_surgeon.data.corpora import Corpus, load_corpus
from llm_surgeon.errors import DataError
from llm_surgeon.recipe.quantity import shown


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Only tests that replace ``load_dataset`` themselves may get to the hub."""

    def refuse(*arguments, **options):
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.fixture
def hub(monkeypatch):
    """Replace the hub by rows; gives a function that sets them and returns the list of calls."""

    def serve(rows: list[dict] | Exception) -> list[tuple]:
        calls: list[tuple] = []

        def load_dataset(name, config, *, split, streaming):
            calls.append((name, config, split, streaming))
            if isinstance(rows, Exception):
                raise rows
            return iter(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def write_jsonl(path: Path, *lines: str) -> str:
    path.write_bytes("\n".join(lines).encode())
    return str(path)


# Corpus


def test_text_joins_the_documents():
    corpus = Corpus(("één", "two"), "here", " | ")
    assert corpus.text == "één | two"
    assert corpus.sha256 == hashlib.sha256("één | two".encode()).hexdigest()


@pytest.mark.parametrize("documents", [(), ("",), (" \n", "\t")])
def test_a_corpus_without_text_is_an_error(documents):
    with pytest.raises(DataError, match="nowhere holds no text"):
        Corpus(documents, "nowhere")


@pytest.mark.parametrize(("total", "held_out", "expected"), [(20, 0.1, 18), (3, 0.1, 2), (2, 0.9, 1), (10, 0.25, 8)])
def test_split_holds_out_the_last_documents(total, held_out, expected):
    corpus = Corpus(tuple(f"d{number}" for number in range(total)), "here", "\n")
    first, last = corpus.split(held_out)
    assert first.documents == corpus.documents[:expected]
    assert last.documents == corpus.documents[expected:]
    assert first.separator == last.separator == "\n"
    assert first.source == f"here, documents 1-{expected} of {total}"
    assert last.source == f"here, documents {expected + 1}-{total} of {total} (held out)"


@pytest.mark.parametrize(
    ("before", "boundary", "after"),
    [
        ("word\n" * 178, "\n", "line\n" * 20),  # A blank line wins over the nearer line ends.
        ("word " * 179, "end\n", "more " * 20),  # Without blank lines, a line end.
        ("x" * 899, " ", "y" * 100),  # Without lines, a space.
        ("x" * 900, "", "x" * 100),  # Without anything, the fraction itself.
        ("a\n\n" + "x" * 897, "", "x" * 97 + "\n\nb"),  # Boundaries near the ends are too far off.
    ],
)
def test_split_cuts_a_single_document_at_a_boundary(before, boundary, after):
    text = before + boundary + after
    first, last = Corpus((text,), "here").split()
    assert (first.text, last.text) == (before + boundary, after)
    assert first.source == f"here, characters 1-{len(first.text)} of {len(text)}"
    assert last.source.endswith("(held out)")


def test_split_takes_the_nearer_boundary():
    text = "x" * 880 + "\n\n" + "y" * 20 + "\n\n" + "z" * 96  # Cuts at 882 and 904 of 1,000.
    assert len(Corpus((text,), "here").split()[0].text) == 904


def test_split_is_always_the_same():
    corpus = Corpus(("one line\n" * 100,), "here")
    assert corpus.split(0.3) == corpus.split(0.3)


@pytest.mark.parametrize("documents", [("x",), ("x" * 100 + " " * 40,), ("a", "b", " ")])
def test_split_with_an_empty_part_is_an_error(documents):
    with pytest.raises(DataError, match="too short to hold out 10%"):
        Corpus(documents, "here").split()


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, 1.5])
def test_split_with_an_impossible_fraction_is_an_error(held_out):
    with pytest.raises(DataError, match="between 0 and 1"):
        Corpus(("a", "b"), "here").split(held_out)


# The demo


def test_demo_specifications_name_a_language(monkeypatch):
    from llm_surgeon.data import demo

    monkeypatch.setattr(demo, "demo_corpus", lambda language: Corpus((language,), "demo"))
    assert [load_corpus(spec).text for spec in ("demo", "demo:en", "demo:fr", "demo:es")] == ["en", "en", "fr", "es"]


@pytest.mark.parametrize("spec", ["demo:de", "demo:", "demo:en:fr"])
def test_an_unknown_demo_language_is_an_error(spec):
    with pytest.raises(DataError, match="demo:en, demo:fr, demo:es"):
        load_corpus(spec)


# Files


def test_txt_is_one_document_byte_exact(tmp_path):
    content = "  first\r\n\r\nsecond\u2028ünd\r\n\n ".encode()
    path = tmp_path / "text.TXT"
    path.write_bytes(content)
    corpus = load_corpus(str(path))
    assert len(corpus.documents) == 1
    assert corpus.text.encode() == content
    assert corpus.source == str(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    # Only at the beginning: within a text U+FEFF is a character.
    (tmp_path / "a.txt").write_text("one\ufefftwo\r\n", encoding="utf-8-sig", newline="")
    assert load_corpus(str(tmp_path / "a.txt")).text == "one\ufefftwo\r\n"
    (tmp_path / "a.jsonl").write_text('"one"\n"two"\n', encoding="utf-8-sig")
    assert load_corpus(str(tmp_path / "a.jsonl")).documents == ("one", "two")


def test_rows_without_text_are_passed_over_wherever_they_are(tmp_path, hub, caplog):
    texts = ["first", None, "", "  second\r\n", None, None, "third"]
    cleaned = write_jsonl(tmp_path / "cleaned.jsonl", *(json.dumps({"text": t}) for t in texts if t is not None))
    lines = write_jsonl(tmp_path / "null.jsonl", *(json.dumps({"text": text}) for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "null.parquet")
    hub([{"text": text} for text in texts])
    sources = {
        lines: lines,
        str(tmp_path / "null.parquet"): str(tmp_path / "null.parquet"),
        "who/what": "who/what:train",
    }
    with caplog.at_level("INFO", "llm_surgeon"):
        for spec, source in sources.items():
            corpus = load_corpus(spec)
            assert corpus.documents == ("first", "", "  second\r\n", "third")
            assert corpus.sha256 == load_corpus(cleaned).sha256
            assert corpus.source == f"{source} (3 rows without text passed over)"
            assert f"Passed over 3 rows without text in {source}." in caplog.text
    assert load_corpus(cleaned).source == cleaned


def test_a_line_of_null_is_a_row_without_text(tmp_path):
    corpus = load_corpus(write_jsonl(tmp_path / "a.jsonl", "null", '"one"'))
    assert (corpus.documents, corpus.source) == (("one",), f"{tmp_path}/a.jsonl (1 row without text passed over)")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_nothing_but_rows_without_text_is_an_error(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", '{"text": null}', '{"text": null}')
    pq.write_table(pa.table({"text": pa.array([None, None], pa.null())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"\(2 rows without text passed over\) holds no text"):
        load_corpus(str(tmp_path / name))


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("words")
    assert load_corpus("~/text.txt").text == "words"


def test_jsonl_takes_objects_and_strings(tmp_path):
    # U+2028 ends a line for str.splitlines, but not in JSON.
    path = write_jsonl(tmp_path / "a.jsonl", '{"text": "one\u2028more", "id": 1}', "", '"two"', '{"text": ""}')
    corpus = load_corpus(path)
    assert corpus.documents == ("one\u2028more", "two", "")
    assert corpus.text == "one\u2028more\n\ntwo\n\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 3 is not JSON"),
        ('{"body": "x", "id": 1}', "line 3 has no key `text`; its keys are body, id"),
        ("{}", "line 3 has no key `text`; its keys are none"),
        (r'{"\ud800": "x"}', r"its keys are \\ud800"),
        ('{"text": "fine"}\r{"text": "fine"}', "line 3 is not JSON"),
        ('{"text": "a\0b"}', "line 3 is not JSON"),
        ('\ufeff{"text": "fine"}', "line 3 is not JSON"),
        ('["x"]', "line 3 begins a JSON array"),
        ("9" * 5000, "line 3 holds no text but int"),
        ('{"text": "x", "more": ' + "[" * 100_000, "line 3 is nested too deeply"),
        ('{"text": ["x"]}', "line 3 holds no text but list"),
        ("17", "line 3 holds no text but int"),
        (r'{"text": "\ud800"}', "line 3 holds a broken character"),
    ],
    ids=shown,
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    path = write_jsonl(tmp_path / "a.jsonl", '{"text": "fine"}', "", line)
    with pytest.raises(DataError, match=message):
        load_corpus(path)


@pytest.mark.parametrize("content", ['[{"text": "x"}, {"text": "y"}]', ' [\n{"text": "x"},\n{"text": "y"}\n]\n'])
def test_a_json_array_is_no_jsonl_and_the_remedy_says_what_is(tmp_path, content):
    path = write_jsonl(tmp_path / "a.jsonl", content)
    with pytest.raises(DataError, match="line 1 begins a JSON array") as caught:
        load_corpus(path)
    assert "one JSON value per line" in caught.value.remedy


def test_what_a_line_holds_beside_the_text_is_of_no_interest(tmp_path):
    digits = "9" * 5000  # More than Python reads as a number.
    line = f'{{"id": {digits}, "text": "fine", "score": NaN, "more": {{"n": [{digits}.5, 1e999]}}}}'
    assert load_corpus(write_jsonl(tmp_path / "a.jsonl", line)).documents == ("fine",)


def test_line_ends_of_windows_are_no_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", '{"text": "one"}\r', "\r", '{"text": "two\\r\\n"}\r', "")
    assert load_corpus(path).documents == ("one", "two\r\n")


def test_jsonl_that_is_not_utf8_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        load_corpus(str(path))


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view()),
        *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())),
    ],
    ids=str,
)
def test_parquet_takes_the_text_column(tmp_path, kind):
    path = tmp_path / "lang=en"  # Not a partition to be read into the table.
    path.mkdir()
    texts = pa.array(["one", "two", "one"], pa.string()).cast(kind)
    pq.write_table(pa.table({"id": [1, 2, 3], "text": texts}), path / "a.parquet")
    assert load_corpus(str(path / "a.parquet")).documents == ("one", "two", "one")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": [1], "body": ["x"]}, "no column `text`; its columns are id, body"),
        ({"text": [1]}, "holds no text but int64"),
        ({"text": [None, ["x"]]}, "holds no text but list"),
        ({"text": [{"body": "x"}]}, "holds no text but struct"),
        ({"text": [b"x"]}, "holds no text but binary"),
    ],
)
def test_a_bad_parquet_column_is_named(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        load_corpus(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"no parquet at all", "not a readable parquet file"),
        ("a.parquet", b"", "not a readable parquet file"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", "words".encode("utf-16"), "not UTF-8"),
        ("a.txt", "words".encode("utf-16-le"), "holds zero bytes"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xef\xbb\xbf", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.csv", b"text\nx\n", "unknown type"),
    ],
)
def test_an_unusable_file_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(str(tmp_path / name))
    assert str(tmp_path / name) in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.parquet", "GONE.TXT"])
def test_a_missing_file_is_an_error_and_never_a_data_set(tmp_path, name):
    with pytest.raises(DataError, match=f"{name} does not exist"):
        load_corpus(str(tmp_path / name))


@pytest.mark.parametrize("name", ["folder", "folder.txt"])
def test_a_folder_is_an_error_and_never_a_data_set(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="is a folder"):
        load_corpus(str(tmp_path / name))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_damaged_parquet_is_an_error(tmp_path, share):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["words"] * 10}), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="not a readable parquet file"):
        load_corpus(str(path))


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.jsonl", "pipe.parquet", "device.txt", "device.jsonl"])
def test_what_may_never_end_is_not_read(tmp_path, name):
    path = tmp_path / name
    if name.startswith("pipe"):
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=rf"{name} is no regular file"):
        load_corpus(str(path))


def test_a_name_that_no_file_can_have_is_an_error():
    with pytest.raises(DataError, match=r"cannot be read: .*too long"):
        load_corpus("x" * 5000 + ".txt")


def test_a_file_that_fails_while_reading_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def fail(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: .*Permission denied"):
        load_corpus(str(tmp_path / "a.txt"))


# The hub


@pytest.mark.parametrize(
    ("spec", "call"),
    [
        ("who/what", ("who/what", None, "train", True)),
        ("who/what:part", ("who/what", "part", "train", True)),
        ("who/what:part:test", ("who/what", "part", "test", True)),
        ("Salesforce/wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True)),
        ("Salesforce/wikitext:wikitext-103-raw-v1", ("Salesforce/wikitext", "wikitext-103-raw-v1", "train", True)),
    ],
)
def test_hub_specifications(hub, spec, call):
    calls = hub([{"text": "one"}, {"text": ""}, {"text": "two"}])
    corpus = load_corpus(spec)
    assert calls == [call]
    assert corpus.documents == ("one", "", "two")
    assert corpus.source == ":".join(part for part in call[:3] if part)


@pytest.mark.parametrize(("limit", "value"), [("HUB_DOCUMENTS", 3), ("HUB_CHARACTERS", 29)])
def test_hub_data_are_taken_up_to_a_limit(hub, monkeypatch, limit, value):
    drawn: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(1_000):
            drawn.append(number)
            yield {"text": "x" * 10}

    monkeypatch.setattr(corpora, limit, value)
    hub(rows())
    corpus = load_corpus("who/what")
    assert len(corpus.documents) == 3
    assert corpus.source == "who/what:train, first 3 documents"
    assert len(drawn) <= 4


def test_rows_without_text_do_not_count_for_the_limit(hub, monkeypatch):
    monkeypatch.setattr(corpora, "HUB_DOCUMENTS", 2)
    hub([{"text": text} for text in (None, "a", None, "b", None)])
    corpus = load_corpus("who/what")
    assert corpus.documents == ("a", "b")
    assert corpus.source == "who/what:train (3 rows without text passed over)"
    hub([{"text": text} for text in (None, "a", None, "b", "c")])
    assert load_corpus("who/what").source == "who/what:train, first 2 documents (2 rows without text passed over)"


@pytest.mark.parametrize("rows", [3, 2])
def test_a_data_set_within_the_limit_is_whole(hub, monkeypatch, rows):
    monkeypatch.setattr(corpora, "HUB_DOCUMENTS", 3)
    hub([{"text": "x"}] * rows)
    assert load_corpus("who/what").source == "who/what:train"


@pytest.mark.parametrize("error", [ConnectionError("no\n  route."), RuntimeError("no\n  route.")])
def test_a_hub_failure_is_one_line_with_a_remedy(hub, error):
    hub(error)
    with pytest.raises(DataError) as caught:
        load_corpus("who/what")
    assert caught.value.cause == f"The data set who/what:train could not be loaded: {type(error).__name__}: no route."
    assert "demo" in caught.value.remedy


def test_a_hub_failure_in_the_middle_is_an_error(hub):
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "x"}
        raise TimeoutError("too slow")

    hub(rows())
    with pytest.raises(DataError, match="TimeoutError: too slow"):
        load_corpus("who/what")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "body": "x"}], "no column `text`; its columns are id, body"),
        ([{"text": 3}], "holds no text but int"),
        ([], "who/what:train holds no text"),
    ],
)
def test_unusable_hub_data_are_errors(hub, rows, message):
    hub(rows)
    with pytest.raises(DataError, match=message) as caught:
        load_corpus("who/what")
    assert "could not be loaded" not in caught.value.cause


@pytest.mark.parametrize("spec", ["", " ", "a:b:c:d", "a::c", ":b", "a:b:c:" + "d" * 1000])
def test_a_malformed_specification_is_an_error(spec):
    with pytest.raises(DataError, match="neither a file nor a data set") as caught:
        load_corpus(spec)
    assert len(caught.value.cause) < 150


def test_the_package_can_read_what_json_writes(tmp_path):
    texts = ["tab\t", 'quote"', "line\nline", "é😀"]
    path = write_jsonl(tmp_path / "a.jsonl", *(json.dumps({"text": text}) for text in texts))
    assert list(load_corpus(path).documents) == texts
