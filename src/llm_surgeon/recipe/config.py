"""The recipe: one validated, frozen, serialisable description of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.recipe.file import read_mapping
from llm_surgeon.recipe.methods import (
    LAYERWISE,
    METHODS,
    CurvatureName,
    LayerwiseScope,
    method_names,
    resolve_curvature,
)
from llm_surgeon.recipe.presets import DEFAULT, METHOD, Preset, options_of
from llm_surgeon.recipe.quantity import LONGEST, closest, parse_quantity, shown

RankBy = Literal["cost-per-weight", "cost"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Precision = Literal["bfloat16", "float32"]
PassOrder = Literal["auto", "batch-major", "layer-major"]
Residence = Literal["auto", "resident", "streamed"]
LayerBudget = Literal["uniform", "owl"]
Bos = Literal["auto", "always", "never"]
Refine = Literal["none", "dsnot", "r2-dsnot"]
Reweight = Literal["grow", "prune", "both"]
Quantity = Annotated[int, BeforeValidator(parse_quantity)]

_DEFAULT, _UNSTRUCTURED = "rows-columns", "unstructured"
# What may be given instead of the sparsity.
TARGETS = ("target_params", "target_bytes", "target_latency")
# What really shrinks; several are joined by "+".
SHAPES = ("rows-columns", "neurons", "heads", "values", "blocks")
# Coupled structures of which no layer loses everything unless asked: the share of the dense width that stays.
_MIN_WIDTH = 0.05
# Curvatures of which the part that belongs to what is left is known without another estimate.
_DIVISIBLE = ("kfac", "activations", "identity")
# Fewer do not keep matrix units busy, more need more memory: on 2 cores, passes over 1,024, 2,048 and 4,096 tokens take
# 1.14, 1 and 0.95 times as long.
PASS_TOKENS = 2048
# Neurons in multiples of this are as fast as in larger ones, see benchmarks/results/widths.md.
ROUND_TO = 32
# Of what takes time or memory of its own, and of what texts and matrices limit: nobody means more.
_FEW, _MANY = 10_000, 10**9
# PyTorch's generators take twice as much, which leaves room for the shots' own seeds.
_MOST_SEED = 2**63 - 1
# Into so many parts cross-fitting divides the calibration sequences.
HALVES = 2


class PruneConfig(BaseModel):
    """Everything that decides the result of a pruning run.

    ``sparsity`` counts the weights of the prunable linear layers only (those of the decoder blocks, without
    biases); embeddings and the output head are left alone, see ``ignore``.
    """

    # Strict: yes is no count, and 3.0 no whole number.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    sparsity: float = Field(
        0.5,
        gt=0.0,
        lt=1.0,
        description="Fraction of the prunable linear weights to remove; embeddings and lm_head are excluded. "
        "For N:M unless given: what removing M-N of every M weights makes.",
    )
    target_params: Quantity | None = Field(
        None, description="Instead of sparsity: parameters of the result, all of them, e.g. 90M."
    )
    target_bytes: Quantity | None = Field(
        None, description="Instead of sparsity: bytes of its weight files, e.g. 300MiB."
    )
    target_latency: float | None = Field(
        None,
        gt=0.0,
        description="Instead of sparsity: milliseconds of a pass over 512 tokens on this device, measured before on "
        "copies of the model with random removals, and afterwards on the result.",
    )
    structure: str = Field(
        _DEFAULT,
        description="What is removed as a unit. Really smaller: rows-columns (of each matrix), neurons, heads, values "
        "(single value dimensions), blocks (attention or feed-forward parts; costly), or several joined by +, e.g. "
        "neurons+heads. Zeros in the old shapes: unstructured (single weights), or N:M, which keeps N of every M "
        "consecutive inputs, e.g. 2:4.",
    )
    preset: Preset = Field(
        DEFAULT,
        description="Options that go together, each of which holds if it is given as well: best (one shot, its model "
        "fitted to the calibration text, nothing trained but gates), fast (the same in half the time) or none (five "
        "shots, nothing fitted). For the method surgeon; the others have none.",
    )
    method: str = Field(
        METHOD,
        description=f"Global: {', '.join(METHODS)}. Layer-wise: {', '.join(LAYERWISE)}; these are for unstructured "
        "(their default) and N:M.",
    )
    curvature: CurvatureName | None = Field(
        None,
        description="Approximation of the Fisher, unset: the method's own. kfac, nearest-kronecker, kronecker-sum (two "
        "products), diagonal, activations or identity.",
    )
    fisher: Literal["empirical", "true"] = Field(
        "empirical", description="Labels of the gradients: empirical (the text's own) or true (sampled from the model)."
    )
    fisher_samples: int = Field(1, ge=1, le=_FEW, description="Sampled labels per token with --fisher true.")
    gradient_share: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Share of the tokens of each sequence that gradient factors are summed over, drawn by the size of "
        "their gradients and weighted (for K-FAC).",
    )
    kronecker_iterations: int = Field(
        2,
        ge=1,
        le=_FEW,
        description="Power iterations of nearest-kronecker and kronecker-sum; two passes over the data each.",
    )
    shots: int = Field(
        5,
        ge=1,
        le=_FEW,
        description="Shots on a linear schedule; curvature is estimated afresh in each. 1 if layer-wise.",
    )
    steps_per_shot: int = Field(
        1,
        ge=1,
        le=_FEW,
        description="Steps in which a shot removes what it has to; in each, costs are computed anew from the shot's "
        "curvature, for what the steps before have left. For structures that shrink.",
    )
    uniform: bool = Field(
        False,
        description="For neurons, heads or blocks: the same widths in every block, so that plain transformers classes "
        "load the export; blocks then go whole.",
    )
    round_to: int | None = Field(
        None,
        ge=1,
        le=_MANY,
        description="For neurons: what is left in each block is a multiple of this (unset: 32 with neurons, else 1).",
    )
    min_width: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="Share of its neurons, heads and value dimensions that each block keeps at least (unset: 0.05 for "
        "structures made of neurons, heads and values, else 0, which lets layers be emptied).",
    )
    rank_by: RankBy = Field(
        "cost-per-weight", description="Rank structures by cost-per-weight freed, or by cost, the paper's raw one."
    )
    calibration: str = Field(
        "demo", min_length=1, description="A hub data set id, a local .txt/.jsonl/.parquet, or demo[:en|fr|es]."
    )
    samples: int = Field(128, ge=1, le=_MANY, description="Calibration sequences.")
    seq_len: int = Field(512, ge=2, le=_MANY, description="Tokens per calibration sequence.")
    windows_per_sample: int = Field(
        1,
        ge=1,
        le=_MANY,
        description="Windows of the text, each from another place, that make up a calibration sequence one behind the "
        "other: as many places as with short sequences, and as much context as in long ones.",
    )
    bos: Bos = Field(
        "auto",
        description="Whether each window, of calibration and of evaluation, begins with the token that begins a text: "
        "auto (where the tokenizer puts one before a text), always or never (windows as they are cut, which published "
        "figures of Llama and OPT are of).",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=_MANY,
        description=f"Calibration sequences per pass; fewer need less memory (unset: {PASS_TOKENS:,} tokens).",
    )
    order: PassOrder = Field(
        "auto",
        description="Of a pass for the curvature: batch-major (each batch through the whole model), layer-major (all "
        "batches through one block before the next: a third more time, and what does not fit may wait on the host or "
        "on disk), or auto: layer-major where the other would not fit.",
    )
    weights: Residence = Field(
        "auto",
        description="Of the blocks: resident (all where the model runs), streamed (in mapped files in TMPDIR, one "
        "block at a time where the model runs; the order is layer-major then), or auto: streamed where they would not "
        "fit.",
    )
    device_memory: Quantity | None = Field(
        None, description="Bytes of GPU memory that the run may use, e.g. 24GiB (unset: what is free)."
    )
    host_memory: Quantity | None = Field(
        None,
        description="Bytes of main memory that the run may use, e.g. 16GiB (unset: what is free). What fits neither "
        "there nor on the device waits on disk, in TMPDIR.",
    )
    dampening_a: float = Field(
        0.01, gt=0.0, description="Damping of the input factor A, as a fraction of its mean diagonal."
    )
    dampening_g: float = Field(
        0.1, gt=0.0, description="Damping of the gradient factor G, as a fraction of its mean diagonal."
    )
    max_correlations: int = Field(
        0,
        ge=0,
        le=_MANY,
        description="Removed structures (or weights) whose update is computed together, at most; 0: all, 1: each as if "
        "the others stayed.",
    )
    update_steps: int = Field(
        20,
        ge=1,
        le=_FEW,
        description="Conjugate-gradient steps of the update of unstructured and N:M pruning, at most.",
    )
    scope: LayerwiseScope | None = Field(
        None,
        description="What the weights are compared within by a layer-wise score: row, layer or global (unset: the "
        "method's own).",
    )
    layer_budget: LayerBudget = Field(
        "uniform", description="Sparsity of the layers: uniform, or owl (blocks with more outliers keep more)."
    )
    owl_multiple: float = Field(5.0, gt=0.0, description="An outlier has more than so many times its block's mean.")
    owl_spread: float = Field(
        0.08, gt=0.0, lt=0.5, description="Half the difference between the largest and the least sparsity."
    )
    score_alpha: float = Field(0.5, ge=0.0, description="Exponent of the input norm in ria and stochria.")
    score_norm: float = Field(2.0, gt=0.0, description="The p of lp-ri.")
    score_ratio: float = Field(0.1, gt=0.0, le=1.0, description="Share of rows and columns that stochria draws.")
    score_activation: bool = Field(True, description="Whether stochria has ria's factor of input norms.")
    sparsegpt_block: int = Field(128, ge=1, le=_MANY, description="Columns whose mask sparsegpt chooses together.")
    refine: Refine = Field(
        "none", description="Refinement of a score's mask without training: none, dsnot or r2-dsnot."
    )
    refine_cycles: int = Field(50, ge=1, le=_MANY, description="Swaps of a row, at most.")
    refine_threshold: float = Field(0.1, ge=0.0, description="Expected error at which a row is left alone.")
    refine_reweight: Reweight = Field(
        "grow", description="Which step of r2-dsnot weighs relatively: grow, prune or both."
    )
    permute: bool = Field(
        False, description="For N:M: order input channels so that important weights spread over the groups."
    )
    seed: int = Field(0, ge=0, le=_MOST_SEED, description="Seed of every random choice.")
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda or cuda:N.")
    dtype: Dtype = Field("auto", description="Type of the weights: auto (as stored), float32, bfloat16 or float16.")
    precision: Precision = Field(
        "bfloat16", description="Arithmetic of the passes: bfloat16 or float32; sums are float32 in any case."
    )
    trust_remote_code: bool = Field(False, description="Run code that the model's checkpoint brings; read it before.")
    reconstruction: bool = Field(
        False,
        description="After each shot, correct what writes into the residual stream by least squares, towards the "
        "stream of the dense model, which is kept, and scale the last norm by the loss; no training. For structures "
        "that shrink.",
    )
    reconstruction_ridge: float = Field(
        0.2, gt=0.0, description="Ridge that holds its weights where they are, as a fraction of the mean squared input."
    )
    reconstruction_copies: int = Field(
        2,
        ge=0,
        le=_FEW,
        description="Copies of the calibration sequences that it is fitted to as well, in which the dense model has "
        "written some of the tokens.",
    )
    reconstruction_share: float = Field(0.5, gt=0.0, le=1.0, description="Share of the tokens of a copy that it has.")
    gate_steps: int = Field(
        0,
        ge=0,
        le=_FEW,
        description="After each shot, Newton steps on gates: one number for the output and the queries of each head, "
        "and for the output and the switch of each group of neurons, by the loss of the calibration text; 0: none. "
        "No other weight is trained.",
    )
    gate_width: int | None = Field(
        None,
        ge=1,
        le=_MANY,
        description="Neurons of a feed-forward part that share gates; unset: all of it, and with cross_fit as few "
        "(16 or more) as leave each gate a token to be set by, with 8,192 gates at most.",
    )
    gate_damping: float | None = Field(
        None,
        gt=0.0,
        description="Damping of these steps, as a fraction of the mean diagonal of the gates' Fisher; unset: the one "
        "with the largest evidence.",
    )
    cross_fit: bool = Field(
        False,
        description="Reconstruct from each half of the calibration sequences by itself, with gates set by the other "
        "half, and take the mean of the two models' weights.",
    )
    lora: bool = Field(False, description="First-order corrections: train low-rank adapters after each shot (peft).")
    lora_rank: int = Field(16, ge=1, le=_FEW, description="Rank of the corrections of one shot.")
    lora_learning_rate: float = Field(1e-3, gt=0.0, description="Learning rate of the corrections.")
    lora_steps: int = Field(
        32, ge=1, le=_MANY, description="Optimizer steps of the corrections after a shot, a batch each."
    )
    lora_final_steps: int = Field(32, ge=1, le=_MANY, description="Steps after the last shot.")
    lora_batch_size: int = Field(2, ge=1, le=_FEW, description="Sequences of a step.")
    lora_share: float = Field(
        1.0, gt=0.0, le=1.0, description="Share of the calibration sequences that the corrections of a shot use."
    )
    export_shots: tuple[int, ...] = Field(
        (), strict=False, description="Shots to export as well, each into OUT/shot-N; repeat for more."
    )
    formats: tuple[str, ...] = Field(("hf",), strict=False, description="Formats to export in; repeat for more.")
    evaluation: str | None = Field(
        None, description="Text to measure perplexity on; unset: held-out text of the calibration source, none: skip."
    )
    eval_window: int = Field(1024, ge=2, le=_MANY, description="Tokens per evaluation window.")
    eval_stride: int | None = Field(None, ge=1, le=_MANY, description="Tokens between windows; unset: the window.")
    eval_tokens: int = Field(20_480, ge=2, le=_MANY, description="Evaluation tokens, at most.")
    ignore: tuple[str, ...] = Field(
        ("lm_head",),
        strict=False,
        description="Layers never pruned: a regular expression on the end of the name; repeat for more.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _of_numpy(cls, value: Any) -> Any:
        """NumPy's whole numbers as Python's own, which is what strict validation takes."""
        if isinstance(value, bool):
            return value
        return int(value) if isinstance(value, Integral) else value

    @field_validator("calibration", "evaluation", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("ignore")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"has {shown(pattern)}, which is no regular expression: {error}") from None
        return patterns

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_depend(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        given = {"preset": DEFAULT if given.get("method", METHOD) == METHOD else "none"} | given
        given = _of_preset(given) | given
        if goes_layerwise(given):
            given = {"structure": _UNSTRUCTURED, "shots": 1} | given
        targets = [name for name in TARGETS if name in given]
        if len([*targets, *(["sparsity"] if "sparsity" in given else [])]) > 1:
            raise ValueError(f"only one of sparsity, {', '.join(TARGETS)} can be given")
        if given.get("weights") == "streamed" and given.get("order", "auto") == "auto":
            given["order"] = "layer-major"
        pattern = Pattern.parse(given.get("structure"))
        return given if pattern is None else {"sparsity": pattern.sparsity} | given

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: str) -> str:
        if method not in method_names():
            raise ValueError(f"is not known: valid are {', '.join(method_names())}")
        return method

    @field_validator("structure")
    @classmethod
    def _check_structure(cls, structure: str) -> str:
        parts = structure.split("+")
        shapes = set(parts) <= set(SHAPES) and len(set(parts)) == len(parts)
        if not shapes and structure != _UNSTRUCTURED and Pattern.parse(structure) is None:
            raise ValueError(
                f"is not known: valid are {', '.join(SHAPES)}, several of these joined by +, unstructured, and N:M "
                "with 0 < N < M, such as 2:4 or 4:8"
            )
        return structure

    @model_validator(mode="after")
    def _check_together(self) -> PruneConfig:
        if self.pattern is not None and self.sparsity > self.pattern.sparsity + 1e-12:
            raise ValueError(
                f"a sparsity of {self.sparsity:g} is more than {self.structure} can reach, which is "
                f"{self.pattern.sparsity:g}"
            )
        if self.seq_len % self.windows_per_sample:
            raise ValueError(
                f"a sequence of {self.seq_len} tokens (seq_len) cannot be {self.windows_per_sample} windows "
                "(windows_per_sample) of equal length"
            )
        if any(not 1 <= shot <= self.shots for shot in self.export_shots):
            raise ValueError(
                f"export_shots {shown(self.export_shots)} are not all between 1 and {self.shots}, the shots"
            )
        if self.preset != "none" and self.method != METHOD:
            raise ValueError(f"preset is for the method {METHOD}, not for {self.method}")
        self._check_shapes()
        if self.target_latency is not None and (self.device_memory or self.host_memory):
            raise ValueError("with target_latency nothing is planned: no device_memory, no host_memory")
        if self.weights == "streamed":
            self._check_streamed()
        if self.layerwise:
            self._check_layerwise()
        else:
            self._check_global()
        return self

    def _check_shapes(self) -> None:
        """What no structure, or not this one, can do.

        Raises:
            ValueError: Naming the options that do not go together.
        """
        parts = set(self.parts)
        if self.target is not None and not parts:
            raise ValueError(f"{self.target} is for structures that shrink, not for {self.structure}: give sparsity")
        if (self.uniform and not parts <= {"neurons", "heads", "blocks"}) or (self.uniform and not parts):
            raise ValueError(f"uniform is for neurons, heads and blocks, not for {self.structure}")
        if self.uniform and "blocks" in parts and len(parts) > 1:
            raise ValueError("uniform blocks go whole: neurons and heads cannot be removed in the same run")
        if self.round_to not in (None, 1) and ("neurons" not in parts or "rows-columns" in parts):
            raise ValueError("round_to is for structures with neurons and without rows-columns")
        if self.reconstruction and not parts:
            raise ValueError(f"reconstruction is for structures that shrink, not for {self.structure}")
        if self.cross_fit and not self.reconstruction:
            raise ValueError("cross_fit is for reconstruction: set it, or leave cross_fit out")
        if self.samples < self.parts_of_text:
            raise ValueError(
                "cross_fit halves the calibration sequences: samples has to be at least 2, or cross_fit off"
            )
        if self.steps_per_shot > 1 and (not parts or self.resolved_curvature not in _DIVISIBLE):
            raise ValueError(f"steps_per_shot is for structures that shrink and the curvatures {', '.join(_DIVISIBLE)}")
        if self.min_width is not None and not parts:
            raise ValueError(f"min_width is for structures that shrink, not for {self.structure}")

    def _check_streamed(self) -> None:
        """What needs all weights where the model runs.

        Raises:
            ValueError: Naming the options that do not go together.
        """
        if self.order == "batch-major":
            raise ValueError("streamed weights come block by block: order cannot be batch-major")
        if self.lora:
            raise ValueError("lora trains all blocks together: weights cannot be streamed")
        if self.reconstruction:
            raise ValueError(
                "reconstruction holds the dense model beside the pruned one: for weights to be streamed it has to be "
                "off (--no-reconstruction)"
            )
        if self.target_latency is not None:
            raise ValueError("a latency is that of resident weights: with target_latency weights cannot be streamed")

    def _check_global(self) -> None:
        """What no global method can do.

        Raises:
            ValueError: Naming the options that do not go together.
        """
        curvature = resolve_curvature(self.method, self.curvature)
        if curvature == "kronecker-sum" and {"heads", "values", "blocks"} & set(self.parts):
            raise ValueError("the kronecker-sum curvature has no joint costs: structure has to be without whole heads")
        if curvature == "kronecker-sum" and self.max_correlations:
            raise ValueError("the kronecker-sum curvature updates all together: max_correlations has to be 0")
        if self.gradient_share < 1 and curvature != "kfac":
            raise ValueError(f"gradient_share is for the curvature kfac, not for {curvature}")
        asked = _layerwise_options(vars(self))
        if asked:
            raise ValueError(
                f"{', '.join(asked)} is for the layer-wise methods ({', '.join(LAYERWISE)}), not for {self.method}"
            )

    def _check_layerwise(self) -> None:
        """What no layer-wise method, or not this one, can do.

        Raises:
            ValueError: Naming the options that do not go together.
        """
        pattern, solver = self.pattern, LAYERWISE[self.method].scope is None
        if self.gate_steps:
            raise ValueError(f"gate_steps is for the global methods ({', '.join(METHODS)}), not for {self.method}")
        if self.parts:
            raise ValueError(
                f"{self.method} as a layer-wise method removes single weights: structure is unstructured or N:M"
            )
        if self.curvature is not None:
            resolve_curvature(self.method, self.curvature)
        if self.shots != 1:
            raise ValueError(f"{self.method} goes through the layers once: shots has to be 1 (got {self.shots})")
        if self.order == "batch-major":
            raise ValueError(f"{self.method} goes layer by layer: order cannot be batch-major")
        if pattern is not None and self.sparsity != pattern.sparsity:
            raise ValueError(f"{self.method} with {self.structure} removes {pattern.sparsity:g}: leave sparsity out")
        if pattern is not None and (self.scope or self.layer_budget != "uniform"):
            raise ValueError("N:M compares within its groups and is the same in all layers: no scope, no layer_budget")
        if self.permute and pattern is None:
            raise ValueError("permute is for N:M")
        if solver and (self.scope or self.refine != "none"):
            raise ValueError(f"{self.method} has its own masks and updates: no scope, no refine")
        if self.global_scope and self.layer_budget != "uniform":
            raise ValueError("a global scope gives each layer its own sparsity: no layer_budget")

    @property
    def pattern(self) -> Pattern | None:
        """The N:M pattern, if the structure is one."""
        return Pattern.parse(self.structure)

    @property
    def target(self) -> str | None:
        """Which target is given instead of the sparsity."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    def at(self, sparsity: float) -> PruneConfig:
        """The recipe with the sparsity that its target comes to."""
        return self.model_validate(
            self.model_dump() | dict.fromkeys(TARGETS) | {"sparsity": min(max(sparsity, 1e-6), 1 - 1e-6)}
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """The structures whose removal shrinks the matrices; none for single weights and N:M."""
        return _parts_of(self.structure)

    @property
    def widths_multiple(self) -> int:
        """What the neurons left in each block are a multiple of."""
        fast = "neurons" in self.parts and "rows-columns" not in self.parts
        return self.round_to or (ROUND_TO if fast else 1)

    @property
    def least_width(self) -> float:
        """Share of its neurons, heads and value dimensions that each block keeps at least."""
        if self.min_width is not None:
            return self.min_width
        return _MIN_WIDTH if self.parts and not {"rows-columns", "blocks"} & set(self.parts) else 0.0

    @property
    def layerwise(self) -> bool:
        """Whether the run goes layer by layer; magnitude does if asked for what only layer-wise methods do."""
        return goes_layerwise(vars(self))

    @property
    def loop(self) -> str:
        """Name of the loop that the method runs in."""
        return "layerwise" if self.layerwise else "shots"

    @property
    def resolved_scope(self) -> LayerwiseScope | None:
        """What a layer-wise method compares weights within: what is asked for, or its own; None if it has none."""
        return self.scope or LAYERWISE[self.method].scope

    @property
    def global_scope(self) -> bool:
        """Whether a layer-wise method compares weights over all layers; N:M compares within its groups."""
        return self.layerwise and self.resolved_scope == "global" and self.pattern is None

    @property
    def sequences_per_pass(self) -> int:
        """Calibration sequences of a pass."""
        return self.batch_size or max(1, min(self.samples, PASS_TOKENS // self.seq_len))

    @property
    def parts_of_text(self) -> int:
        """Parts of the calibration sequences that are fitted to apart; each process needs one of each at least."""
        return HALVES if self.cross_fit else 1

    @property
    def resolved_curvature(self) -> CurvatureName | None:
        """The curvature of the run: the one named, or the method's own; None for layer-wise methods."""
        return None if self.layerwise else resolve_curvature(self.method, self.curvature)

    @property
    def correlated(self) -> bool:
        """Whether a global method's costs and updates know of correlations."""
        return METHODS[self.method].correlated

    @property
    def sparsity_schedule(self) -> list[float]:
        """Sparsity after each shot, linear from dense to the target (paper, Alg. 2)."""
        return [self.sparsity * shot / self.shots for shot in range(1, self.shots + 1)]

    def resolved(self) -> dict[str, Any]:
        """Every option with the value that it has in the run; ``from_mapping`` of it gives the same run."""
        return self.model_dump(mode="json") | {
            "batch_size": self.sequences_per_pass,
            "curvature": self.resolved_curvature,
            "scope": self.resolved_scope if self.layerwise and self.pattern is None else None,
            "round_to": self.widths_multiple if self.parts else None,
            "min_width": self.least_width if self.parts else None,
        }

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.resolved(), sort_keys=False)

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> PruneConfig:
        """Validate a mapping of options.

        Raises:
            ConfigError: If a key is unknown or a value is out of range; names each of them.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _refusal(error.errors(include_url=False)) from None


def _parts_of(structure: Any) -> tuple[str, ...]:
    """The structures that shrink matrices and are joined by + in the name of one; none in any other."""
    parts = tuple(structure.split("+")) if isinstance(structure, str) else ()
    return parts if parts and parts[0] in SHAPES else ()


def _of_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the preset of a recipe stands for, with the rest of the recipe as it is."""
    return options_of(
        given["preset"],
        shrinks=bool(_parts_of(given.get("structure", _DEFAULT))),
        divides=given.get("curvature", _DIVISIBLE[0]) in _DIVISIBLE,
        reconstructs=given.get("reconstruction", True),
    )


def _layerwise_options(values: Mapping[str, Any]) -> list[str]:
    """Which options that only layer-wise methods have are on."""
    off = {"scope": (None, "global"), "layer_budget": ("uniform",), "refine": ("none",), "permute": (False,)}
    return [name for name, without in off.items() if values.get(name, without[0]) not in without]


def goes_layerwise(values: Mapping[str, Any]) -> bool:
    """Whether a method goes layer by layer; one that is of both kinds does if asked for what only that kind has."""
    method = values.get("method")
    if not isinstance(method, str) or method not in LAYERWISE:
        return False
    return method not in METHODS or bool(_layerwise_options(values))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed between two mappings of options, each in words; other keys may be among them."""
    return [
        f"{name} was {shown(before.get(name))} and is {shown(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe as a mapping of options with underscores; hyphens in keys are accepted.

    Raises:
        ConfigError: If the file cannot be read or is not a mapping.
    """
    # 2:4 and true are text for the options that take text, and for no others.
    return read_mapping(
        path, {name for name, field in PruneConfig.model_fields.items() if _takes_text(field.annotation)}
    )


def _takes_text(annotation: Any) -> bool:
    """Whether an option takes text: any, or some words."""
    if annotation is str or get_origin(annotation) is Literal:
        return True
    return any(_takes_text(argument) for argument in get_args(annotation))


# What the validation finds, by pydantic's names, in words that go behind the name of an option.
_KINDS = {
    "int_type": "has to be a whole number",
    "float_type": "has to be a number",
    "bool_type": "has to be true or false",
    "string_type": "has to be text",
    "string_too_short": "has to be text",
    "string_unicode": "has to be text without broken characters",
    "tuple_type": "has to be a list",
    "finite_number": "has to be a finite number",
}
_LIMITS = {
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}
# So many of its problems a message lists.
_MOST_PROBLEMS = 5


def _refusal(issues: Sequence[Mapping[str, Any]]) -> ConfigError:
    """What the validation found, in words."""
    problems = [_problem(issue) for issue in issues[:_MOST_PROBLEMS]]
    if len(issues) > _MOST_PROBLEMS:
        problems.append(f"and {len(issues) - _MOST_PROBLEMS:,} more")
    # What is wrong with several options together names them as a recipe does.
    words = [word for issue in issues if not issue["loc"] for word in re.findall(r"\w+_\w+", issue["msg"])]
    spelt = ", ".join(_spelt(word) for word in dict.fromkeys(words) if word in PruneConfig.model_fields)
    return ConfigError(
        f"The recipe is not valid: {'; '.join(problems)}.",
        f"{f'On the command line: {spelt}. ' if spelt else ''}`llm-surgeon prune --help` explains each option.",
    )


def _problem(issue: Mapping[str, Any]) -> str:
    """One finding of the validation, with the offending value if it concerns a single option."""
    message = issue["msg"].removeprefix("Value error, ")
    # The input of what is wrong with several options together would be the whole recipe.
    if not issue["loc"]:
        return str(message)
    name, value = str(issue["loc"][0]), issue["input"]
    if name not in PruneConfig.model_fields:
        meant = closest(name, PruneConfig.model_fields)
        return f"{shown(name)} is no option{f' (did you mean {meant}?)' if meant else ''}"
    if issue["type"] in _LIMITS:
        (limit,) = issue["ctx"].values()
        message = f"has to be {_LIMITS[issue['type']]} {f'{limit:,}' if isinstance(limit, int) else f'{limit:g}'}"
    else:
        message = _KINDS.get(issue["type"], message.replace("Input should be", "has to be", 1))
    option = _spelt(name) if _spelt(name) == f"--{name}" else f"{_spelt(name)} ({name} in a recipe)"
    kind = "the text " if isinstance(value, str) and issue["type"] in ("int_type", "float_type", "bool_type") else ""
    meant = _meant(name, value)
    return f"{option} {message} (got {kind}{shown(value)}{f'; did you mean {meant}?' if meant else ''})"


def _spelt(name: str) -> str:
    """An option as the command line spells it."""
    word = name.replace("_", "-")
    return f"--{word} or --no-{word}" if PruneConfig.model_fields[name].annotation is bool else f"--{word}"


def _meant(name: str, value: Any) -> str | None:
    """What may have been meant by a value that an option does not take."""
    field = PruneConfig.model_fields[name]
    bounds = [getattr(limit, "lt", getattr(limit, "le", None)) for limit in field.metadata]
    if any(bound is not None and bound <= 1 for bound in bounds):
        return _as_fraction(value)
    if not isinstance(value, str):
        return None
    if name == "structure":
        parts = [closest(part, (*SHAPES, _UNSTRUCTURED)) for part in value[:LONGEST].split("+")]
        return "+".join(part for part in parts if part) if all(parts) else None
    return closest(value, method_names() if name == "method" else _choices(field.annotation))


def _as_fraction(value: Any) -> str | None:
    """The fraction that a percentage stands for, if the value looks like one."""
    percent = re.fullmatch(r"\s*([0-9]{1,2}(\.[0-9]{1,9})?)\s*%\s*", value) if isinstance(value, str) else None
    if percent is not None:
        return f"{float(percent[1]) / 100:g}"
    return f"{value / 100:g}" if isinstance(value, int | float) and 2 <= value < 100 else None


def _choices(annotation: Any) -> tuple[str, ...]:
    """The words that an option takes, if it takes only some."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for argument in get_args(annotation) for word in _choices(argument))
