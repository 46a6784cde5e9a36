"""Chats as documents: rows of messages in the forms that people have, and their text by the tokenizer's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_surgeon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys by which a row is a chat, in the order in which they are looked for.
MESSAGES, SHAREGPT, PROMPT, COMPLETION = "messages", "conversations", "prompt", "completion"
FORMS = f"`{MESSAGES}`, `{SHAREGPT}`, or `{PROMPT}` and `{COMPLETION}`"
# Speakers of ShareGPT's rows as roles of a template.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


@dataclass(frozen=True)
class Chat:
    """A chat, as the template of a tokenizer takes it.

    Attributes:
        messages: Messages with ``role`` and ``content``, and what else a template may use.
        tools: Descriptions of tools, for templates that show them; None without.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: list[Any] | None = None


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row has the keys of a chat."""
    return MESSAGES in row or SHAREGPT in row or (PROMPT in row and COMPLETION in row)


def chat_of(row: Mapping[str, Any], location: str) -> Chat | None:
    """The chat of a row with the keys of one; None if it is null or has no messages.

    Args:
        row: The row.
        location: Place of the row in words, for errors.

    Raises:
        DataError: If its messages are none.
    """
    given = row.get(MESSAGES) if row.get(MESSAGES) is not None else row.get(SHAREGPT)
    if given is None:
        prompt, completion = row.get(PROMPT), row.get(COMPLETION)
        if prompt is None or completion is None:
            return None
        given = [*_said(prompt, "user", location), *_said(completion, "assistant", location)]
    return chat_from(given, location, row.get("tools"))


def chat_from(messages: Any, location: str, tools: Any = None) -> Chat | None:
    """A chat of a list of messages, in either spelling; None if it is empty.

    Raises:
        DataError: If it is no list of messages.
    """
    found = tuple(_message(message, location) for message in _listed(messages, location))
    described = tools if isinstance(tools, list) and tools else None
    return Chat(found, described) if found else None


def _said(given: Any, role: str, location: str) -> Sequence[Any]:
    """Messages of a prompt or a completion, which may be a text.

    Raises:
        DataError: If it is neither.
    """
    return [{"role": role, "content": given}] if isinstance(given, str) else _listed(given, location)


def _listed(messages: Any, location: str) -> Sequence[Any]:
    """Messages, which have to be a list.

    Raises:
        DataError: If they are none.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"{location} holds no messages but {type(messages).__name__}.", "Write a list of messages.")
    return messages


def _message(message: Any, location: str) -> Mapping[str, Any]:
    """A message with a role and a text; entries that are null, as columns of a table make them, are left out.

    Raises:
        DataError: If it has no role.
    """
    if not isinstance(message, Mapping):
        raise DataError(
            f"{location} holds a message that is no object but {type(message).__name__}.",
            "Write each message with `role` and `content`, or with `from` and `value`.",
        )
    given = {name: value for name, value in message.items() if value is not None}
    if "from" in given and "role" not in given:
        speaker = str(given.pop("from"))
        given = {"role": _ROLES.get(speaker.lower(), speaker), "content": given.pop("value", ""), **given}
    if not isinstance(given.get("role"), str):
        raise DataError(
            f"{location} holds a message without a role.",
            "Write each message with `role` and `content`, or with `from` and `value`.",
        )
    return {**given, "content": _text(given.get("content", ""), location)}


def _text(content: Any, location: str) -> str:
    """Text of a message, of which the parts of a list are joined.

    Raises:
        DataError: If a part is no text.
    """
    parts = content if isinstance(content, Sequence) and not isinstance(content, str) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    strange = next((part for part in texts if not isinstance(part, str)), None)
    if strange is not None or any(text is None for text in texts):
        raise DataError(f"{location} holds a message with something else than text.", "Leave out images and the like.")
    whole = "".join(text for text in texts if text is not None)
    try:
        whole.encode("utf8")
    except UnicodeEncodeError:
        raise DataError(f"{location} holds a broken character (half a surrogate pair).", "Remove it.") from None
    return whole


def text_of(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, asks: bool = False) -> str:
    """Text of a chat by the tokenizer's template.

    Args:
        chat: The chat.
        tokenizer: The tokenizer.
        asks: Whether the text goes on up to where the model is to answer.

    Raises:
        ValueError: If the template refuses the chat, with the template's words.
    """
    messages = [dict(message) for message in chat.messages]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False, add_generation_prompt=asks)
        )
    # A template is a program of its own, and may raise whatever it likes.
    except Exception as error:
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None
