"""Corpora, texts made of documents: from the embedded demo, a local file or a data set of the hub."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_surgeon.data.chats import (
    COMPLETION,
    FORMS,
    MESSAGES,
    PROMPT,
    SHAREGPT,
    Chat,
    chat_from,
    chat_of,
    is_chat,
    text_of,
)
from llm_surgeon.errors import DataError
from llm_surgeon.recipe.quantity import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Limits of a hub data set. They are enough for 1,000 calibration samples of 2,048 tokens in English, and for the whole
# training split of WikiText-2.
HUB_DOCUMENTS = 50_000
HUB_CHARACTERS = 12_000_000

PARAGRAPH = "\n\n"
FILE_TYPES = (".txt", ".jsonl", ".parquet")
HUB_DEFAULT_CONFIGS = {"Salesforce/wikitext": "wikitext-2-raw-v1"}
TEXT = "text"
# Digits of the longest whole number that is read as it is.
_DIGITS = 1000
# Share of the chats that a template may refuse; more are a mistake.
_MOST_REFUSED = 0.5
_USE_LOCAL = "Give a local .txt, .jsonl or .parquet file, or `demo`, which needs no hub."


@dataclass(frozen=True)
class Corpus:
    """A text made of documents, which may be chats at first; see ``rendered``.

    Attributes:
        documents: The documents, in order.
        source: Source of the documents in words, for reports.
        separator: Text between two documents in ``text``.
    """

    documents: tuple[str | Chat, ...]
    source: str
    separator: str = PARAGRAPH

    def __post_init__(self) -> None:
        """Refuse a corpus without text.

        Raises:
            DataError: If no document holds anything but white space.
        """
        if not any(_holds_text(document) for document in self.documents):
            raise DataError(f"{self.source} holds no text.", "Give a source with text in it.")

    @property
    def text(self) -> str:
        """All documents, joined by the separator.

        Raises:
            TypeError: If there are chats, which have no text before a tokenizer has rendered them.
        """
        return self.separator.join(self.documents)  # type: ignore[arg-type]  # join raises for chats

    @property
    def chats(self) -> int:
        """Number of documents that are chats."""
        return sum(isinstance(document, Chat) for document in self.documents)

    def rendered(self, tokenizer: PreTrainedTokenizerBase) -> Corpus:
        """The corpus with all chats as texts, by the template of a tokenizer. Chats that it refuses are passed over.

        Raises:
            DataError: If there are chats and no template, or the template refuses more than half of the chats.
        """
        if not self.chats:
            return self
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{self.source} holds chats, and the tokenizer has no template for them.",
                "Give the tokenizer of a chat model, or rows with a key `text`.",
            )
        documents, refused, why = list[str](), 0, ""
        for document in self.documents:
            if isinstance(document, str):
                documents.append(document)
                continue
            try:
                documents.append(text_of(document, tokenizer))
            except ValueError as error:
                refused, why = refused + 1, str(error)
        if refused > _MOST_REFUSED * self.chats:
            raise DataError(
                f"The tokenizer's template refuses {refused:,} of the {self.chats:,} chats of {self.source}: {why}.",
                "Write them as the template wants them, or with a key `text`.",
            )
        source = f"{self.source}, {self.chats - refused:,} chats"
        if refused:
            log.warning("The tokenizer's template refuses %d chats of %s, as in: %s.", refused, self.source, why)
            source = f"{source} ({refused:,} refused by the template)"
        # A template ends a chat by itself.
        separator = "" if self.chats == len(self.documents) else self.separator
        return Corpus(tuple(documents), source, separator)

    @property
    def sha256(self) -> str:
        """SHA-256 of ``text`` in UTF-8, as hexadecimal digits."""
        return hashlib.sha256(self.text.encode("utf8")).hexdigest()

    def split(self, held_out: float = 0.1) -> tuple[Corpus, Corpus]:
        """Set the last part of the text aside, always with the same cut.

        Several documents are cut between two of them; a single one is cut at a paragraph, a line or a word.

        Args:
            held_out: Fraction to hold out: of the documents, or of the characters of a single one.

        Returns:
            The first part, and the part held out.

        Raises:
            DataError: If ``held_out`` is not between 0 and 1, or either part would hold no text.
        """
        if not 0.0 < held_out < 1.0:
            raise DataError(f"The fraction to hold out is {held_out}.", "Use a fraction between 0 and 1.")
        parts: tuple[tuple[str | Chat, ...], tuple[str | Chat, ...]]
        total = len(self.documents)
        if total == 1 and isinstance(text := self.documents[0], str):
            cut = _cut_position(text, held_out)
            parts, unit, total = ((text[:cut],), (text[cut:],)), "characters", len(text)
        else:
            cut = min(max(1, total - round(total * held_out)), total - 1)
            parts, unit = (self.documents[:cut], self.documents[cut:]), "documents"
        if not all(any(_holds_text(document) for document in part) for part in parts):
            raise DataError(
                f"{self.source} is too short to hold out {held_out:.0%} of it.",
                "Give a longer text, or name a text of its own to evaluate on.",
            )
        return (
            Corpus(parts[0], f"{self.source}, {unit} 1-{cut} of {total}", self.separator),
            Corpus(parts[1], f"{self.source}, {unit} {cut + 1}-{total} of {total} (held out)", self.separator),
        )


def load_corpus(spec: str, characters: int | None = None) -> Corpus:
    """Load the text that a specification names; only for a hub data set is the network used.

    Args:
        spec: ``demo`` or ``demo:en|fr|es``; the path of a .txt (one document, byte-exact but for a byte-order mark),
            .jsonl (one object or one string per line) or .parquet file; else a hub data set as ``name``,
            ``name:config`` or ``name:config:split`` (its first documents, see ``HUB_DOCUMENTS`` and
            ``HUB_CHARACTERS``). ``#COLUMN`` behind it names the key, or column, of the text or of the messages. Without
            it that is ``text``, or else a chat (see ``chats``). A file or folder called ``demo`` is named ``./demo``.
            Rows whose text is null are passed over. Empty texts are documents like others, as in the usual protocol
            for WikiText, whose blank lines are rows.
        characters: Characters to take of a hub data set, at most; None: ``HUB_CHARACTERS``.

    Returns:
        The corpus.

    Raises:
        DataError: If the text is missing, unreadable or empty.
        DownloadError: If the demo text is not in the cache and cannot be fetched.
    """
    spec, column = _column_of(spec)
    if spec == "demo" or spec.startswith("demo:"):
        if column is not None:
            raise DataError(f"The demo text has no column {shown(column)}.", "Leave #COLUMN out.")
        return _load_demo(spec)
    path = os.path.expanduser(spec)
    if path.lower().endswith(FILE_TYPES) or _is_path(spec) or os.path.exists(path):
        return _load_file(Path(path), column)
    return _load_hub(spec, column, characters or HUB_CHARACTERS)


def _column_of(spec: str) -> tuple[str, str | None]:
    """A specification without the name of its column, and that name; a file may have such a name itself.

    Raises:
        DataError: If there is a mark for a column, and no name.
    """
    before, mark, column = spec.rpartition("#")
    if not mark or os.path.exists(os.path.expanduser(spec)):
        return spec, None
    if not column.strip() or not before.strip():
        raise DataError(f"The text {shown(spec)} names no column behind its #.", "Write TEXT#COLUMN, or leave # out.")
    return before, column


def without_column(spec: str) -> str:
    """A specification without the name of its column, whether or not the file is there any more."""
    return spec.rpartition("#")[0] or spec


def _is_path(spec: str) -> bool:
    """Tell whether a specification looks like the path of a file, existing or not; no data set has such a name."""
    return spec.startswith(("/", "./", "../", "~")) or "\\" in spec or "\0" in spec


def _load_demo(spec: str) -> Corpus:
    # demo.py needs Corpus from this module, so this module can only import it late.
    from llm_surgeon.data.demo import LANGUAGES, demo_corpus

    language = spec.partition(":")[2] if ":" in spec else "en"
    # A loop instead of a membership test, so that the type checker sees one of the literals.
    for known in LANGUAGES:
        if language == known:
            return demo_corpus(known)
    raise DataError(
        f"The demo text has no language {shown(language)}.", f"Use one of demo:{', demo:'.join(LANGUAGES)}."
    )


def _load_file(path: Path, column: str | None) -> Corpus:
    """Read a local file by its suffix."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        if path.is_dir():
            raise DataError(f"The text {path} is a folder.", f"Name one {', '.join(FILE_TYPES)} file.")
        if not path.exists():
            raise DataError(f"The text file {path} does not exist.", "Check the path.")
        # Reading from a pipe or a device may never end.
        if not path.is_file():
            raise DataError(f"The text {path} is no regular file.", f"Save it as one {', '.join(FILE_TYPES)} file.")
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"The text {path} has an unknown type.", f"Give a {', '.join(FILE_TYPES)} file.")
        texts = tuple(reader(path, column))
    except OSError as error:
        raise DataError(f"The text file {path} cannot be read: {_one_line(error)}.", "Check the file.") from None
    documents = tuple(text for text in texts if text is not None)
    return Corpus(documents, _with_count(str(path), len(texts) - len(documents)))


def _with_count(source: str, missing: int) -> str:
    """Source in words with the number of rows that were passed over, which is also logged."""
    if not missing:
        return source
    rows = f"{missing:,} row{'s' if missing > 1 else ''} without text"
    log.info("Passed over %s in %s.", rows, source)
    return f"{source} ({rows} passed over)"


def _read_txt(path: Path, column: str | None) -> Iterator[str | Chat | None]:
    if column is not None:
        raise DataError(f"{path} has no columns, and its column {shown(column)} was named.", "Leave #COLUMN out.")
    # Bytes, because text mode would translate line ends.
    text = _decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), str(path))
    if "\0" in text:
        raise DataError(f"{path} holds zero bytes, as UTF-16 and binary files do.", "Save it as UTF-8 text.")
    yield text


def _read_jsonl(path: Path, column: str | None) -> Iterator[str | Chat | None]:
    """Yield the text or the chat of each line, None where the text is null; lines without content are no rows."""
    with path.open("rb") as file:
        # A binary file splits at \n only; str.splitlines would also split at U+2028, which JSON strings may hold.
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield _json_document(content, f"{path}, line {number}", column)


def _json_document(line: bytes, location: str, column: str | None) -> str | Chat | None:
    """Text or chat of a line of JSON; None if it is null."""
    content = _decode(line, location)
    if content.lstrip().startswith("["):
        raise DataError(f"{location} begins a JSON array.", "Write one JSON value per line, e.g. with jq -c '.[]'.")
    try:
        # Python refuses to read numbers of thousands of digits, which nothing here needs.
        value = json.loads(content, parse_int=lambda digits: int(digits) if len(digits) <= _DIGITS else 0)
    except json.JSONDecodeError as error:
        raise DataError(f"{location} is not JSON: {error}.", "Write one JSON value per line.") from None
    except RecursionError:
        raise DataError(f"{location} is nested too deeply.", "Leave out what is not the text.") from None
    if isinstance(value, dict):
        return document_of(value, location, column, "key")
    if column is not None:
        raise DataError(f"{location} has no keys, and the key {shown(column)} was named.", "Leave #COLUMN out.")
    return None if value is None else checked_text(value, location)


def document_of(row: Mapping[str, Any], location: str, column: str | None, unit: str = "column") -> str | Chat | None:
    """Text or chat of a row; None if it is null. The unit is what names a value, in words.

    Raises:
        DataError: If the row has neither, or not the column that was named.
    """
    name = TEXT if column is None else column
    if column is None and TEXT not in row and is_chat(row):
        return chat_of(row, location)
    if name not in row:
        raise DataError(
            f"{location} has no {unit} `{_names([name])}`; its {unit}s are {_names(row)}.",
            f"Name the {unit} that holds the text: {unit.upper()} in TEXT#{unit.upper()}. Chats have {FORMS}.",
        )
    value = row[name]
    if isinstance(value, list) and column is not None:
        return chat_from(value, location, row.get("tools"))
    return None if value is None else checked_text(value, location)


def _read_parquet(path: Path, column: str | None) -> Iterator[str | Chat | None]:
    """Yield the texts or the chats of the rows, None where they are null."""
    # Imported late: it takes a while, and most runs read no parquet.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            wanted = _columns(file.schema_arrow.names, str(path), column)
            _check_kind(file.schema_arrow, wanted[0], path, lists=column is not None or wanted[0] != TEXT)
            row = 0
            for batch in file.iter_batches(columns=wanted):
                for values in batch.to_pylist():
                    row += 1
                    yield document_of(values, f"{path}, row {row}", column)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable parquet file: {_one_line(error)}.", "Write it again.") from None


def _check_kind(schema: Any, name: str, path: Path, *, lists: bool) -> None:
    """Make sure that a column holds texts or, where that is possible, lists of messages.

    Raises:
        DataError: If it holds something else.
    """
    import pyarrow as pa

    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    listed = lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind))
    if not listed and kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise DataError(
            f"The column `{_names([name])}` of {path} holds no text but {_shortened(str(kind))}.",
            "Write it as strings.",
        )


def _columns(names: Sequence[str], source: str, column: str | None) -> list[str]:
    """Columns of a table that hold the text or the chat.

    Raises:
        DataError: If there are none.
    """
    name = TEXT if column is None else column
    found = [name] if name in names else []
    if column is None and not found and is_chat(dict.fromkeys(names)):
        found = [key for key in (MESSAGES, SHAREGPT, PROMPT, COMPLETION) if key in names]
    if not found:
        raise DataError(
            f"{source} has no column `{_names([name])}`; its columns are {_names(names)}.",
            f"Name the column that holds the text: COLUMN in TEXT#COLUMN. Chats have {FORMS}.",
        )
    return [*found, *(["tools"] if "tools" in names and found != [TEXT] else [])]


def _load_hub(spec: str, column: str | None, characters: int) -> Corpus:
    """Stream the first documents of a hub data set."""
    parts = spec.split(":")
    if len(parts) > 3 or not all(part.strip() for part in parts):
        raise DataError(
            f"The text {shown(spec)} is neither a file nor a data set.",
            f"Write a hub data set as name, name:config or name:config:split. {_USE_LOCAL}",
        )
    name = parts[0]
    config = parts[1] if len(parts) > 1 else HUB_DEFAULT_CONFIGS.get(name)
    split = parts[2] if len(parts) > 2 else "train"
    source = ":".join(part for part in (name, config, split) if part)
    try:
        documents, missing, complete = _take(_stream(name, config, split, column), characters)
    except DataError:
        raise
    # Loading runs code of many file formats and network clients, which raise errors of every kind.
    except Exception as error:
        raise DataError(
            f"The data set {source} could not be loaded: {type(error).__name__}: {_one_line(error)}.", _USE_LOCAL
        ) from error
    if not complete:
        log.info("Took the first %d documents of %s.", len(documents), source)
        source = f"{source}, first {len(documents)} documents"
    return Corpus(documents, _with_count(source, missing))


def _stream(name: str, config: str | None, split: str, column: str | None) -> Iterator[str | Chat | None]:
    """Yield the texts or the chats of a hub data set, None where they are null."""
    # Imported late: it takes a while, and only hub data sets need it.
    from datasets import load_dataset

    for row in load_dataset(name, config, split=split, streaming=True):
        yield document_of(row, f"The data set {name}", column)


def _take(texts: Iterable[str | Chat | None], most: int = HUB_CHARACTERS) -> tuple[tuple[str | Chat, ...], int, bool]:
    """Take texts up to the limits of a hub data set: so many characters, and documents in proportion.

    Returns:
        The texts, the number of rows without a text among them, and whether the data set ended there.
    """
    taken: list[str | Chat] = []
    missing = characters = 0
    documents = HUB_DOCUMENTS * most // HUB_CHARACTERS
    for text in texts:
        if text is None:
            missing += 1
        elif len(taken) >= documents or characters >= most:
            return tuple(taken), missing, False
        else:
            taken.append(text)
            characters += _length(text)
    return tuple(taken), missing, True


def _holds_text(document: str | Chat) -> bool:
    return isinstance(document, Chat) or bool(document.strip())


def _length(document: str | Chat) -> int:
    """Number of characters of a document, of a chat without what the template adds."""
    if isinstance(document, str):
        return len(document)
    return sum(len(message["content"]) for message in document.messages)


def _cut_position(text: str, held_out: float) -> int:
    """Start of the held-out part of a single document: after the boundary nearest to the fraction."""
    target = len(text) - round(len(text) * held_out)
    # No farther than half of the smaller part, so that a lone blank line near an end is not taken.
    reach = int(len(text) * min(held_out, 1.0 - held_out) / 2)
    for boundary in (PARAGRAPH, "\n", " "):
        before = text.rfind(boundary, max(0, target - reach), target)
        after = text.find(boundary, target, target + reach)
        cuts = [found + len(boundary) for found in (before, after) if found >= 0]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - target))
    return target


def _decode(content: bytes, location: str) -> str:
    try:
        return content.decode("utf8")
    except UnicodeDecodeError as error:
        raise DataError(f"{location} is not UTF-8 text: {error}.", "Save it as UTF-8.") from None


def checked_text(value: Any, location: str) -> str:
    """Return ``value`` if it is text that a tokenizer can take.

    Raises:
        DataError: If ``value`` is no string, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError(
            f"{location} holds no text but {type(value).__name__}.",
            "Each entry needs a string, in a field called `text`.",
        )
    try:
        value.encode("utf8")
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which is no character; tokenizers fail on it.
        raise DataError(f"{location} holds a broken character (half a surrogate pair).", "Remove it.") from None
    return value


def _one_line(error: BaseException) -> str:
    """Message of an error on one line, shortened."""
    return _shortened(str(error)).rstrip(".") or "no message"


def _names(names: Iterable[str]) -> str:
    """Names of columns or keys, shortened; half a surrogate pair, which no terminal takes, as JSON spells it."""
    return _shortened(", ".join(names).encode("utf8", "backslashreplace").decode()) or "none"


def _shortened(text: str) -> str:
    """Text on one line, of 300 characters at most."""
    return " ".join(text.split())[:300]
