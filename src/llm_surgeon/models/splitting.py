"""Check that the tokenizer which transformers makes of a checkpoint splits text as its tokenizer.json does."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Numbers, contractions, spaces, line ends, code, other scripts and signs: where ways of splitting differ.
_PROBES = (
    *("in 2023, 650 dogs", "3.14159 and 1,000,000", "it's they'll DON'T", "  two  spaces\tand\n\nlines \n end"),
    *(
        "def f(x):\n    return x ** 2  # \u00a7",
        "na\u00efve \u00c5ngstr\u00f6m \u041c\u043e\u0441\u043a\u0432\u0430",
        "\u6771\u4eac\u3068 \u0627\u0644\u0639",
        "\u2014 \u201cquoted\u201d \u2026 \U0001f600\U0001f44d\U0001f3fd",
    ),
)


def warn_of_splitting(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Log a warning if a tokenizer splits text otherwise than the file that it was made from.

    The class that transformers has for a type of model may replace the file's way of splitting by its own. Text is then
    split otherwise than in training.

    Args:
        tokenizer: The tokenizer that transformers has made.
        file: The tokenizer.json of the checkpoint; if it does not exist, nothing is compared.
    """
    if not file.is_file():
        return
    try:
        stored = Tokenizer.from_file(str(file))
    # The library has no class of errors of its own. It is enough that transformers could load the tokenizer.
    except Exception:
        logger.debug("%s cannot be read by itself", file, exc_info=True)
        return
    for probe in _PROBES:
        of_file = stored.encode(probe, add_special_tokens=False).ids
        of_class = tokenizer(probe, add_special_tokens=False).input_ids
        if of_file != of_class:
            kind = type(tokenizer).__name__
            logger.warning(
                "%s, which transformers takes for this type of model, splits text otherwise than %s: %r into %d "
                "tokens, the file into %d. The run uses %s, and copies the file as it is. If the model was trained "
                "with the file's tokens, what is measured here is not what it can do",
                *(kind, file.name, probe, len(of_class), len(of_file), kind),
            )
            return
