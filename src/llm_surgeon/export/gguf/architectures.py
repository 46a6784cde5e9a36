"""The table of llama.cpp's architectures, and the choice of one that can say a model.

A row says what the graph of an architecture computes. A model that needs something else is refused, as the engine would
leave it out without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from llm_surgeon.errors import ConfigError

# Kinds of biases, by the names of their tensors in a block.
QKV_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})
ALL_BIASES = QKV_BIASES | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
# Kinds of rotary embeddings in which each frequency has a divisor of its own.
DIVIDED = frozenset({"llama3", "longrope"})
_TWO_NORMS = ("attn_norm", "ffn_norm")
_SILU = frozenset({"silu", "swish"})
# The engine has one formula for all of them, that with the hyperbolic tangent.
_GELU = frozenset({"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"})


@dataclass(frozen=True)
class Architecture:
    """One row: what the graph of an architecture computes.

    Attributes:
        name: Name in the file's ``general.architecture``.
        norms: Names of a block's norms, in the order of ``Family.residual.norms``.
        layer_norm: Whether norms subtract the mean and have a bias; the others divide by the root mean square only.
        norm_offset: Number that is added to the weights of norms in the file.
        activations: Activations, by their names in transformers, that the graph has.
        gate: Place of the gate of the feed-forward part: a matrix of its own, joined before ``ffn_up``, or none.
        stacked: Whether queries, keys and values are one matrix.
        neighbours: Whether rotary embeddings rotate dimension 2d of a head with 2d + 1, not d with d + half.
        partial: Whether rotary embeddings may rotate a share of each head only.
        divisors: Kinds of rotary embeddings with divisors of the frequencies whose tensors the graph reads.
        rotary: Whether there are rotary embeddings; otherwise there is a table of positions.
        head_norms: Whether queries and keys have a norm over the dimensions of each head.
        biases: Kinds of biases that the graph adds.
        needs_biases: Whether every one of them has to be in the file.
        per_block: Whether blocks may differ in their numbers of heads and neurons.
        attention_free: Whether a block other than the first may have no heads.
        whole_heads: Whether the heads together have to be as wide as the residual stream.
        head: Source of the output head: ``own`` needs a tensor, ``either`` takes the embedding where there is none,
            ``embedding`` always takes that.
        windows: Whether some blocks attend to a window only, which at least one then has to do.
        caps: Whether scores of attention and logits are capped.
        odd_scale: Number of blocks with which the scale of attention follows another rule, if there is such a number.
    """

    name: str
    norms: tuple[str, ...] = _TWO_NORMS
    layer_norm: bool = False
    norm_offset: float = 0.0
    activations: frozenset[str] = _SILU
    gate: Literal["own", "joined", "none"] = "own"
    stacked: bool = False
    neighbours: bool = False
    partial: bool = False
    divisors: frozenset[str] = frozenset()
    rotary: bool = True
    head_norms: bool = False
    biases: frozenset[str] = frozenset()
    needs_biases: bool = False
    per_block: bool = False
    attention_free: bool = False
    whole_heads: bool = False
    head: Literal["own", "either", "embedding"] = "either"
    windows: bool = False
    caps: bool = False
    odd_scale: int | None = None

    @property
    def approximate(self) -> bool:
        """Whether the engine computes the activation from a table of rounded values."""
        return self.activations is _GELU


_LLAMA = Architecture("llama", neighbours=True, divisors=frozenset({"llama3", "longrope"}), biases=ALL_BIASES)
_DECI = replace(_LLAMA, name="deci", per_block=True, attention_free=True)
_QWEN2 = Architecture("qwen2", biases=QKV_BIASES, whole_heads=True)
_QWEN3 = Architecture("qwen3", head_norms=True)
_OPENELM = Architecture("openelm", stacked=True, head_norms=True, per_block=True, head="embedding")
_GEMMA2 = Architecture(
    "gemma2",
    norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
    norm_offset=1.0,
    activations=_GELU,
    head="embedding",
    windows=True,
    caps=True,
    odd_scale=46,
)
_GEMMA3 = replace(_GEMMA2, name="gemma3", head_norms=True, caps=False, odd_scale=62)
_PHI3 = Architecture(
    "phi3", stacked=True, gate="joined", partial=True, divisors=frozenset({"longrope"}), whole_heads=True
)
_GPT2 = Architecture(
    "gpt2",
    layer_norm=True,
    activations=_GELU,
    gate="none",
    stacked=True,
    rotary=False,
    biases=ALL_BIASES - {"ffn_gate"},
    needs_biases=True,
    whole_heads=True,
)
_GPTNEOX = replace(_GPT2, name="gptneox", rotary=True, partial=True, head="own")

# Architectures of a family, by its model type. The first that can say a model is taken: the family's own comes first,
# as other programs know more of it.
_CHOICES: dict[str, tuple[Architecture, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "qwen2": (_QWEN2, _DECI),
    "qwen3": (_QWEN3, _OPENELM),
    "gemma2": (_GEMMA2,),
    "gemma3_text": (_GEMMA3,),
    "phi3": (_PHI3, _DECI),
    "gpt2": (_GPT2,),
    "gpt_neox": (_GPTNEOX,),
}


@dataclass(frozen=True)
class Needs:
    """Demands of a model on an architecture, beyond those of all models of its family.

    Attributes:
        uneven: Whether blocks differ in their numbers of heads or neurons, or lack a part.
        narrow: Whether the heads together are not as wide as the residual stream.
        tied: Whether the output head is the embedding.
        rope: Kind of the rotary embeddings; empty if there are none.
        biases: Kinds of biases.
        activation: Name of the activation.
    """

    uneven: bool
    narrow: bool
    tied: bool
    rope: str
    biases: frozenset[str]
    activation: str


def choose(form: str, model_type: str, needs: Needs) -> Architecture:
    """The first architecture of a family that has what a model needs.

    Args:
        form: Name of the format, for the message.
        model_type: The family's type in transformers.
        needs: What the model needs.

    Raises:
        ConfigError: If there is none.
    """
    choices = _CHOICES.get(model_type)
    if choices is None:
        raise ConfigError(
            f"llama.cpp has no architecture for {model_type}, so that the format {form} cannot say such a model.",
            "Leave it out of --format: hf takes every model.",
        )
    objections = [_objection(choice, needs) for choice in choices]
    for choice, objection in zip(choices, objections, strict=True):
        if objection is None:
            return choice
    # A later row takes uneven models; what it objects to is what stands in the way of these.
    cause, remedy = objections[-1 if needs.uneven else 0] or ("", "")
    name = choices[-1 if needs.uneven else 0].name
    raise ConfigError(f"In the format {form}, llama.cpp's architecture {name} {cause}.", remedy)


def _objection(row: Architecture, needs: Needs) -> tuple[str, str] | None:
    """Reason why an architecture cannot say a model, and the remedy; None if it can."""
    other = "Leave the format out: --format hf takes the model as it is."
    if needs.activation not in row.activations:
        return f"computes other activations than {needs.activation}", other
    if needs.biases - row.biases:
        return f"adds no biases for {_listed(needs.biases - row.biases)}", other
    if row.head == "embedding" and not needs.tied:
        return "takes its embedding for the output head, and the model has another head", (
            "Remove equally many units in every block (--uniform), or leave the format out: --format hf."
            if needs.uneven
            else other
        )
    if needs.rope in DIVIDED and needs.rope not in row.divisors:
        return f"reads no divisors of frequencies, which rotary embeddings of the kind {needs.rope} have", other
    if needs.uneven and not row.per_block:
        return "has one width for all blocks, and the model's blocks differ", (
            "Remove equally many units in every block: --structure neurons with --uniform."
            if row.whole_heads
            else "Remove equally many units in every block: --structure neurons+heads with --uniform."
        )
    if needs.narrow and row.whole_heads:
        return "needs heads that together are as wide as the residual stream", (
            "Keep all heads: --structure neurons, or leave the format out: --format hf."
        )
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
