"""Tokenizer of a GGUF file: keys from which llama.cpp makes the same tokens as the tokenizer of transformers.

Texts that llama.cpp splits otherwise all the same, as it lacks the means, are named in ``TokenizerKeys.differences``.
For every tokenizer:

- Letters and digits that Unicode 16 added in 2024 may be split elsewhere: llama.cpp's tables are older.
- Of added tokens that overlap in a text, llama.cpp takes the longest, and the tokenizer the leftmost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.export.gguf.pieces import SPACE, piece_scores, spacing_of
from llm_surgeon.export.gguf.pre_tokenizers import REMEDY, flattened, pre_tokenizer_of

# Texts that llama.cpp takes for special tokens wherever a vocabulary has them, be they so or not.
_TAKEN = frozenset(
    (  # noqa: SIM905  # as a list, it would have a line for each
        "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> _<EOT> [EOT] [EOS] "
        "<|eom_id|> <\uff5cend\u2581of\u2581sentence\uff5c> <end_of_utterance> <|return|> <|call|> <|calls|> "
        "<|flush|> </s> <eos> <turn|> [e~[ <|tool_response> <|fim_prefix|> <fim-prefix> <fim_prefix> "
        "<\uff5cfim\u2581begin\uff5c> <PRE> \u2581<PRE> <|code_prefix|> <|prefix|> <|fim_suffix|> <fim-suffix> "
        "<fim_suffix> <\uff5cfim\u2581hole\uff5c> <SUF> \u2581<SUF> <|code_suffix|> <|suffix|> <|fim_middle|> "
        "<fim-middle> <fim_middle> <\uff5cfim\u2581end\uff5c> <MID> \u2581<MID> <|code_middle|> <|middle|> "
        "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> "
        "<|file_sep|>"
    ).split()
)
# Tokens that end a turn of a chat, and with it what is generated, the likeliest first.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<turn|>")
_NFC = (
    "A text that is not in Unicode's composed form (NFC) is not brought into it by llama.cpp: a letter with a mark of "
    "its own becomes other tokens."
)


@dataclass(frozen=True)
class TokenizerKeys:
    """Tokenizer in the terms of llama.cpp.

    Attributes:
        model: Kind of the tokenizer: ``gpt2`` merges bytes, and ``llama`` characters by the scores of tokens.
        pre: llama.cpp's name for the way in which a text is split into words.
        tokens: The tokens by their ids, as many as the model has.
        types: Their types.
        scores: Their scores, for ``llama``.
        merges: The merges in their order, for ``gpt2``.
        special: Ids of the tokens with a task: some of ``bos``, ``eos``, ``unk``, ``pad`` and ``eot``.
        begins: Whether a text gets ``bos`` before it.
        ends: Whether a text gets ``eos`` after it.
        space: Whether a text gets a space before it.
        templates: Chat templates by their names; that which is used without a name is ``default``.
        differences: Texts of which llama.cpp makes other tokens all the same, a sentence each.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    special: Mapping[str, int]
    begins: bool
    ends: bool
    space: bool
    templates: Mapping[str, str] = field(default_factory=dict)
    differences: tuple[str, ...] = ()


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TokenizerKeys:
    """Add a tokenizer to the metadata of a GGUF file.

    Args:
        writer: Writer of the file.
        tokenizer: The tokenizer.
        vocab_size: Number of tokens of the model, the rows of its embedding.

    Returns:
        What was added.

    Raises:
        UnsupportedModelError: If llama.cpp cannot do what the tokenizer does.
    """
    keys = tokenizer_keys(tokenizer, vocab_size)
    writer.add_tokenizer_model(keys.model)
    writer.add_tokenizer_pre(keys.pre)
    writer.add_token_list(keys.tokens)
    writer.add_token_types(keys.types)
    if keys.scores is not None:
        writer.add_token_scores(keys.scores)
    if keys.merges is not None:
        writer.add_token_merges(keys.merges)
    for name, number in keys.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(keys.begins)
    writer.add_add_eos_token(keys.ends)
    writer.add_add_space_prefix(keys.space)
    writer.add_remove_extra_whitespaces(False)
    # One by one, as the writer puts those of a list in an order that changes from run to run.
    for name, template in sorted(keys.templates.items()):
        writer.add_string(f"tokenizer.chat_template{'' if name == 'default' else f'.{name}'}", template)
    if names := sorted(keys.templates.keys() - {"default"}):
        writer.add_array("tokenizer.chat_templates", names)
    return keys


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TokenizerKeys:
    """A tokenizer in the terms of llama.cpp.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Number of tokens of the model, the rows of its embedding.

    Raises:
        UnsupportedModelError: If llama.cpp cannot do what the tokenizer does.
    """
    backend = _backend(tokenizer)
    begins, ends, special = _special(tokenizer, vocab_size)
    common: dict[str, Any] = {
        "special": special,
        "begins": begins,
        "ends": ends,
        "templates": _templates(tokenizer),
    }
    if backend["model"].get("byte_fallback"):
        return _pieces(backend, vocab_size, common)
    return _byte_level(backend, vocab_size, common)


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's backend, as in ``tokenizer.json``, if it merges pairs without variations."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise UnsupportedModelError(
            f"The tokenizer ({type(tokenizer).__name__}) is not one of the tokenizers library.", REMEDY
        )
    backend: dict[str, Any] = json.loads(fast.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise UnsupportedModelError(f"The tokenizer is of the kind {model['type']}, and only BPE is written.", REMEDY)
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedModelError(
                f"llama.cpp has nothing like the tokenizer's {option} ({model[option]!r}).", REMEDY
            )
    model["merges"] = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    return backend


def _byte_level(backend: Mapping[str, Any], vocab_size: int, common: Mapping[str, Any]) -> TokenizerKeys:
    """Keys of a tokenizer that merges bytes."""
    model = backend["model"]
    pre = pre_tokenizer_of(backend)
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - model["vocab"].keys()
    if missing and model.get("unk_token") is not None:
        raise UnsupportedModelError(
            f"The tokenizer has no tokens for {len(missing)} of the 256 bytes, and llama.cpp has no unknown token.",
            REMEDY,
        )
    normalizers = [step["type"] for step in flattened(backend["normalizer"])]
    if normalizers not in ([], ["NFC"]):
        raise UnsupportedModelError(
            f"llama.cpp does not change a text as this tokenizer does ({', '.join(normalizers)}).", REMEDY
        )
    differences = [*_stripped(backend["added_tokens"])]
    if normalizers:
        differences.append(_NFC)
    if pre.difference is not None:
        differences.append(pre.difference)
    vocabulary = _Vocabulary(backend, vocab_size)
    return TokenizerKeys(
        model="gpt2",
        pre=pre.name,
        tokens=vocabulary.tokens,
        types=vocabulary.types,
        scores=None,
        merges=tuple(" ".join(pair) for pair in model["merges"]),
        space=False,
        differences=(*differences, *vocabulary.differences),
        **common,
    )


def _pieces(backend: Mapping[str, Any], vocab_size: int, common: Mapping[str, Any]) -> TokenizerKeys:
    """Keys of a tokenizer that merges characters, and has bytes for those it does not know."""
    model = backend["model"]
    spacing = spacing_of(backend)
    if model.get("ignore_merges"):
        raise UnsupportedModelError("llama.cpp has nothing like ignore_merges for tokenizers of this kind.", REMEDY)
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - model["vocab"].keys()
    if missing:
        raise UnsupportedModelError(f"The tokenizer has no tokens for {len(missing)} of the 256 bytes.", REMEDY)
    vocabulary = _Vocabulary(backend, vocab_size)
    # Tokens that are looked for in the text before the merges cannot arise from them, save for runs of spaces.
    found = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    merged = (
        number
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind not in found or (kind == TokenType.USER_DEFINED and SPACE in token)
    )
    return TokenizerKeys(
        model="llama",
        pre="default",
        tokens=vocabulary.tokens,
        types=vocabulary.types,
        scores=tuple(piece_scores(vocabulary.tokens, merged, model["merges"])),
        merges=None,
        space=spacing.prefix,
        differences=(*spacing.differences, *_stripped(backend["added_tokens"]), *vocabulary.differences),
        **common,
    )


class _Vocabulary:
    """The tokens of a backend by their ids, with their types; ids without a token are filled.

    Attributes:
        tokens: The tokens.
        types: Their types.
        differences: Texts of which llama.cpp makes other tokens, as of those beyond the model's last.
    """

    def __init__(self, backend: Mapping[str, Any], vocab_size: int) -> None:
        model = backend["model"]
        added = {token["id"]: token for token in backend["added_tokens"]}
        texts = {number: token for token, number in model["vocab"].items()}
        texts |= {number: token["content"] for number, token in added.items()}
        if beyond := sorted(number for number in texts if number >= vocab_size):
            self._check_beyond(beyond, added, texts, vocab_size)
        taken, tokens, types = set(texts.values()), list[str](), list[TokenType]()
        for number in range(vocab_size):
            filler = f"[PAD{number}]"
            while filler in taken:
                filler = f"[{filler}]"
            tokens.append(texts.get(number, filler))
            types.append(_type(texts.get(number), added.get(number), model))
        self.tokens, self.types = tuple(tokens), tuple(types)
        plain = [text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL and text in _TAKEN]
        self.differences = (
            *(f"{texts[number]!r} is not found in a text: the model has no row for this token." for number in beyond),
            *(f"{text!r} in a text is taken for a special token by llama.cpp." for text in plain),
        )

    @staticmethod
    def _check_beyond(beyond: list[int], added: Mapping[int, Any], texts: Mapping[int, str], vocab_size: int) -> None:
        for number in beyond:
            if number not in added:
                raise UnsupportedModelError(
                    f"The tokenizer's token {number} ({texts[number]!r}) is beyond the {vocab_size} tokens of the "
                    "model.",
                    "Give the tokenizer that the model was made with.",
                )


def _type(text: str | None, added: Mapping[str, Any] | None, model: Mapping[str, Any]) -> TokenType:
    """Type of a token: None stands for an id that has none."""
    if text is None:
        return TokenType.UNUSED
    pieces = bool(model.get("byte_fallback"))
    if pieces and text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _stripped(added: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Yield what is said of added tokens that take the space beside them, or stand for whole words only."""
    names = [token["content"] for token in added if token["lstrip"] or token["rstrip"]]
    if names:
        yield f"White space beside {_listed(names)} stays a token of its own in llama.cpp."
    names = [token["content"] for token in added if token["single_word"]]
    if names:
        yield f"{_listed(names)} is found within words too in llama.cpp."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tokens" if len(names) > 3 else "")


def _special(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[bool, bool, dict[str, int]]:
    """Whether a text gets a token before it and one after it, and the ids of the tokens with a task."""
    before, after = _ends(tokenizer)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if len(before) > 1 or len(after) > 1 or after not in ([], [ids["eos"]]):
        names = tokenizer.convert_ids_to_tokens([*before, *after])
        raise UnsupportedModelError(
            f"The tokenizer puts {names} around a text; llama.cpp puts one before it, and the end token after it.",
            REMEDY,
        )
    if before:
        ids["bos"] = before[0]
    if ids["eos"] is None:
        raise UnsupportedModelError(
            "The tokenizer has no end token, and llama.cpp would take another one for it.",
            "Name one in its tokenizer_config.json (eos_token).",
        )
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    ids["eot"] = next((vocabulary[end] for end in _TURN_ENDS if vocabulary.get(end) in special), None)
    return bool(before), bool(after), {name: n for name, n in ids.items() if n is not None and n < vocab_size}


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer really puts before and after a text, whatever its settings say."""
    bare: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole: list[int] = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise UnsupportedModelError("The tokenizer changes a text's own tokens when it adds special ones.", REMEDY)


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Chat templates by their names."""
    template = tokenizer.chat_template
    if template is None:
        return {}
    return dict(template) if isinstance(template, Mapping) else {"default": template}
