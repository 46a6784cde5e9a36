"""Benchmark of Torch-Pruning (github.com/VainF/Torch-Pruning) on the other benchmarks' model, tokens and evaluation.

    pip install torch-pruning==1.6.1
    python benchmarks/against_torch_pruning.py CALIBRATION.txt EVALUATION.txt [--ours EXPORT]

Structures: neurons and query heads with the hidden dimension left alone, and its published recipe for language models
(examples/LLMs/prune_llm.py), which narrows the hidden dimension as well. Importance: magnitude as in that recipe, and
first-order Taylor with the gradient summed over all calibration windows. The pruning ratio is searched so that the
size is the smallest one that is not below the target; nothing is trained or updated afterwards. --ours adds the shots
of an export of llm-surgeon that have these sizes.

Writes benchmarks/results/torch_pruning.json and .md after each row. Rows that are in the result already are not run
again; remove the JSON file to start afresh.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import PROTOCOL, circumstances, finished, table, write
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon import PruneConfig, PruneReport
from llm_surgeon.data.texts import prepare_texts
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.loading import load_model, load_tokenizer, resolve_source
from llm_surgeon.run.job import versions
from llm_surgeon.system.allocator import keep_freed_memory

try:
    import torch_pruning as tp
except ImportError:
    raise SystemExit("This benchmark needs Torch-Pruning: pip install torch-pruning==1.6.1") from None

NAME, VERSION = "torch_pruning", "1.6.1"
TARGETS = (0.8, 0.7, 0.5)
# Halvings of the interval of the pruning ratio: finer than one neuron of 1,536.
HALVINGS = 11
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Options for Torch-Pruning.

    Attributes:
        importance: ``magnitude`` or ``taylor``.
        head_ratio: Ratio for heads; None is that of all other structures, as in its published recipe.
        everywhere: Whether the neurons of all blocks are ranked together.
        hidden: Whether the hidden dimension is narrowed too, with sizes a multiple of 4, as in its published recipe.
    """

    importance: str
    head_ratio: float | None
    everywhere: bool = False
    hidden: bool = False

    @property
    def asked(self) -> dict[str, Any]:
        """Columns of the recipe in a row of the result."""
        return {
            "structure": "neurons+heads+hidden (its recipe)" if self.hidden else "neurons+heads",
            "importance": self.importance,
            "ranking": "all blocks together" if self.everywhere else "each block",
        } | ({} if self.head_ratio is None else {"head_pruning_ratio": round(self.head_ratio, 5)})


# When Torch-Pruning ranks the heads of all blocks together, it takes the number of key/value heads for that of all
# heads. The last recipe, which ranks all blocks together, therefore leaves heads alone.
NEURONS = [Recipe(importance, heads) for importance in ("magnitude", "taylor") for heads in (1 / 3, 0.0)]
NEURONS.append(Recipe("taylor", 0.0, everywhere=True))
PUBLISHED = Recipe("magnitude", None, hidden=True)


def fresh(gradients: Gradients | None = None, blocks: int | None = None) -> PreTrainedModel:
    """Load the dense model, or its first blocks, with gradients if there are any."""
    model = load_model(resolve_source("demo"), "float32", "cpu")
    model.config.use_cache = False
    model.model.layers = model.model.layers[:blocks]
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name] if gradients else None
    return model


def calibrate(tokens: CalibrationTokens) -> Gradients:
    """Gradients of the dense model's next-token loss, summed over the windows, in float32."""
    model = fresh()
    for ids, _mask in tokens.batches(1):
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def importance_of(recipe: Recipe) -> Any:
    """Importance of Torch-Pruning, with the settings of its published recipe or else its defaults."""
    if recipe.importance == "magnitude":
        return tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    return tp.importance.GroupTaylorImportance()


def cut(model: PreTrainedModel, recipe: Recipe, ratio: float) -> None:
    """Prune a model in place by Torch-Pruning, in one step."""
    config, implementation = model.config, model.config._attn_implementation
    attentions = [block.self_attn for block in model.model.layers]
    heads = {attention.q_proj: config.num_attention_heads for attention in attentions}
    for attention in attentions:
        heads |= dict.fromkeys((attention.k_proj, attention.v_proj), config.num_key_value_heads)
    # Through fused attention Torch-Pruning cannot see which outputs of queries and values belong together.
    model.set_attn_implementation("eager")
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=torch.arange(8)[None],
        importance=importance_of(recipe),
        global_pruning=recipe.everywhere,
        pruning_ratio=ratio,
        # All layers that write into the stream of hidden states are one group, and an ignored member keeps all of it.
        ignored_layers=[model.lm_head] + ([] if recipe.hidden else [model.model.embed_tokens]),
        round_to=4 if recipe.hidden else None,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio if recipe.head_ratio is None else recipe.head_ratio,
        # The defaults of these are dictionaries that all pruners of a process would share.
        in_channel_groups={},
        out_channel_groups={},
    )
    for group in pruner.step(interactive=True):
        group.prune()
    model.set_attn_implementation(implementation)
    for attention in attentions:
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    check(model)


def shapes(block: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linear layers of a block, by the last part of their names."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name.rpartition(".")[2]: tuple(module.weight.shape) for name, module in linears.items()}


def check(model: PreTrainedModel) -> None:
    """Make sure that the shapes of all blocks fit together.

    Raises:
        AssertionError: If they do not fit.
    """
    hidden, width = model.model.embed_tokens.weight.shape[1], model.config.head_dim
    for block in model.model.layers:
        of = shapes(block)
        assert of["q_proj"] == of["o_proj"][::-1]
        assert of["k_proj"] == of["v_proj"]
        assert of["gate_proj"] == of["up_proj"] == of["down_proj"][::-1]
        assert {of[name][1] for name in ("q_proj", "k_proj", "gate_proj")} == {hidden}
        assert of["q_proj"][0] % of["k_proj"][0] == 0
        assert of["k_proj"][0] % width == 0


def kept(model: PreTrainedModel, dense: int) -> float:
    """Share of the dense weights of the blocks' linear layers that is left."""
    return sum(rows * columns for block in model.model.layers for rows, columns in shapes(block).values()) / dense


def search(share: Callable[[float], float], target: float) -> float:
    """Search the largest pruning ratio, to 2 ** -HALVINGS, whose share of kept weights is not below the target."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) >= target else (low, middle)
    return low


def ratio_for(recipe: Recipe, target: float, gradients: Gradients | None) -> float:
    """Pruning ratio for a target, searched on one block if all blocks are cut alike, whatever the importance."""
    uniform = not recipe.everywhere
    trial = Recipe("magnitude", recipe.head_ratio, hidden=recipe.hidden) if uniform else recipe

    def share(ratio: float) -> float:
        model = fresh(None if uniform else gradients, blocks=1 if uniform else None)
        dense = prunable(model)
        cut(model, trial, ratio)
        return kept(model, dense)

    return search(share, target)


def prunable(model: PreTrainedModel) -> int:
    """Number of prunable weights of a dense model, as the package counts them."""
    return examine(model, family_of(model.config.model_type)).prunable_weights


def measured(recipe: Recipe, target: float, gradients: Gradients | None, text: EvaluationText) -> dict[str, Any]:
    """Search the ratio, prune and evaluate: one row of the result."""
    ratio = ratio_for(recipe, target, gradients)
    model = fresh(gradients)
    dense, start = prunable(model), time.perf_counter()
    cut(model, recipe, ratio)
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    width = model.config.head_dim
    neurons = [shapes(block)["gate_proj"][0] for block in model.model.layers]
    heads = [shapes(block)["q_proj"][0] // width for block in model.model.layers]
    return {
        "head_pruning_ratio": round(ratio, 5),
        **recipe.asked,
        "target": target,
        "kept": round(kept(model, dense), 5),
        "pruning_ratio": round(ratio, 5),
        "neurons": [min(neurons), max(neurons)],
        "query_heads": [min(heads), max(heads)],
        "key_value_heads": model.model.layers[0].self_attn.k_proj.out_features // width,
        "hidden": model.model.embed_tokens.weight.shape[1],
        "perplexity": round(perplexity(model, text).perplexity, 2),
        "seconds": round(seconds, 1),
    }


def described(protocol: dict[str, Any], tokens: CalibrationTokens, text: EvaluationText) -> dict[str, Any]:
    """Result without rows: protocol, circumstances and dense perplexity."""
    return circumstances("python benchmarks/against_torch_pruning.py CALIBRATION.txt EVALUATION.txt") | {
        "device": "cpu",
        "versions": versions() | {"torch-pruning": VERSION},
        "protocol": protocol,
        "calibration": tokens.provenance,
        "gradient_seconds": None,
        "dense_perplexity": round(perplexity(fresh(), text).perplexity, 2),
        "unadjusted": [unadjusted(target) for target in TARGETS],
        "rows": [],
    }


def unadjusted(target: float) -> dict[str, Any]:
    """Size of the model with one and the same ratio for neurons and heads, the hidden dimension left alone."""
    model = fresh(blocks=1)
    dense = prunable(model)
    cut(model, Recipe("magnitude", None), 1 - target)
    of = shapes(model.model.layers[0])
    return {
        "ratio": round(1 - target, 5),
        "kept": round(kept(model, dense), 5),
        "neurons": of["gate_proj"][0],
        "query_heads": of["q_proj"][0] // model.config.head_dim,
    }


def our_rows(folders: list[Path]) -> list[dict[str, Any]]:
    """Rows for the shots of our exports that have the size of a target."""
    rows = []
    for folder in folders:
        report = PruneReport.model_validate_json((folder / "report.json").read_text(encoding="utf8"))
        method = f"{report.config['method']}, shots: {report.config['shots']}"
        seconds = 0.0
        for shot in report.shots:
            seconds += shot.seconds
            target = min(TARGETS, key=lambda size, left=1 - shot.sparsity: abs(size - left))
            if abs(target - (1 - shot.sparsity)) < 0.01 and shot.perplexity:
                rows.append(
                    {
                        "structure": f"llm-surgeon, {report.config.get('structure', 'rows-columns')}",
                        "importance": method,
                        "ranking": "all blocks together",
                        "target": target,
                        "kept": round(1 - shot.sparsity, 5),
                        "perplexity": round(shot.perplexity.perplexity, 2),
                        "seconds": round(seconds, 1),
                        "evaluation": shot.perplexity.model_dump(),
                    }
                )
    return rows


def span(row: dict[str, Any], name: str) -> str | None:
    """Smallest and largest number of a block, or the one number, in words; None if the row has none."""
    low, high = row.get(name, (None, None))
    return f"{low}" if low == high and low is not None else None if low is None else f"{low} to {high}"


def markdown(result: dict[str, Any]) -> str:
    """Table of the result, and its circumstances, as Markdown."""
    rows = [
        [
            row["structure"],
            row["importance"],
            row["ranking"],
            f"{100 * row['kept']:.2f} %",
            span(row, "neurons"),
            span(row, "query_heads"),
            row.get("hidden"),
            f"{row['perplexity']:,}",
            row["seconds"],
        ]
        for target in TARGETS
        for row in result["rows"]
        if row["target"] == target
    ]
    heading = [
        "structure",
        "importance",
        "ranked over",
        "weights kept",
        "neurons",
        "query heads",
        "hidden",
        "perplexity",
        "seconds",
    ]
    asked = "; ".join(
        f"ratio {100 * item['ratio']:g} %: {100 * item['kept']:.2f} % kept, {item['neurons']} neurons, "
        f"{item['query_heads']} query heads"
        for item in result["unadjusted"]
    )
    return (
        f"# Torch-Pruning {VERSION} on the same model, tokens and evaluation\n\nSmolLM2-135M-Instruct, kept share of "
        f"the prunable weights (linear layers of the blocks); dense perplexity {result['dense_perplexity']}. "
        f"{result['date']}, {result['machine']}, on the {result['device']}, torch {result['versions']['torch']}, "
        f"transformers {result['versions']['transformers']}. Command: `{result['command']}`\n\n"
        f"{table(heading, rows)}\n\n"
        "- No training. Torch-Pruning leaves the weights that stay as they are. Per block the dense model has 1536 "
        "neurons, 9 query heads and 3 key/value heads; its hidden states are 576 wide. A range is from the block with "
        "least to the one with most.\n"
        "- The ratio for neurons is searched so that the size is the smallest one not below the target (80, 70, 50 %); "
        "heads go in thirds, so there is a row with a third of the query heads asked for and one with none. "
        f"Without such an adjustment, one ratio for both gives: {asked}.\n"
        "- With grouped queries, Torch-Pruning removes the same number of query heads from each group and keeps "
        "every key/value head. Two thirds of 9 query heads would leave as many as there are key/value heads; it then "
        "takes the attention for an ungrouped one, its check refuses the block's attention, and all heads stay, "
        "without a message. Ranked over all blocks, it takes the number of key/value heads for that of all heads, and "
        "asks for far too many to go, so that row leaves heads alone.\n"
        "- Magnitude: `GroupMagnitudeImportance`, L2, mean over the group's layers, as in its published recipe "
        f"(its `GroupNormImportance` is not in {VERSION}). Taylor: "
        "`GroupTaylorImportance` with its defaults, gradient in float32 of the next-token loss summed over "
        f"{result['protocol']['samples']} windows of {result['protocol']['seq_len']} tokens, "
        f"{result['gradient_seconds']} s once for all rows.\n"
        "- Seconds: pruning alone, without the gradient and the search; of llm-surgeon, all shots up to this size "
        "with their curvature and updates.\n"
        "- Its recipe is examples/LLMs/prune_llm.py: one ratio for hidden dimension, neurons and heads, each block "
        "alike, sizes a multiple of 4. The embedding is narrowed with it, which the share of kept weights does not "
        "count.\n" + (f"- {result['note']}\n" if result.get("note") else "")
    )


def main() -> None:
    """Run all recipes at all sizes, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--ours", type=Path, action="append", default=[], help="export of llm-surgeon; may be repeated")
    parser.add_argument("--note", help="what a reader of the table has to know")
    parser.add_argument("--samples", type=int, default=PROTOCOL["samples"])
    parser.add_argument("--eval-tokens", type=int, default=PROTOCOL["eval_tokens"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="(?s)Unwrapped parameters detected")
    keep_freed_memory()
    given = {name: getattr(arguments, name) for name in ("calibration", "evaluation", "samples", "eval_tokens")}
    texts = prepare_texts(load_tokenizer(resolve_source("demo")), PruneConfig.from_mapping(PROTOCOL | given))
    assert texts.evaluation is not None
    protocol = {name: (PROTOCOL | given)[name] for name in PROTOCOL if name not in ("sparsity", "shots")}
    result = finished(NAME) or described(protocol, texts.calibration, texts.evaluation)
    if result["protocol"] != protocol:
        parser.error("the result that is there has another protocol: remove its JSON file")
    result["note"] = arguments.note or result.get("note")
    result["rows"] = our_rows(arguments.ours) + [row for row in result["rows"] if "pruning_ratio" in row]
    write(NAME, result, markdown(result))
    gradients: Gradients | None = None
    for recipe, target in itertools.product([*NEURONS, PUBLISHED], TARGETS):
        if any((recipe.asked | {"target": target}).items() <= row.items() for row in result["rows"]):
            continue
        if recipe.importance == "taylor" and gradients is None:
            start = time.perf_counter()
            gradients = calibrate(texts.calibration)
            result["gradient_seconds"] = round(time.perf_counter() - start, 1)
        used = gradients if recipe.importance == "taylor" else None
        result["rows"].append(measured(recipe, target, used, texts.evaluation))
        write(NAME, result, markdown(result))


if __name__ == "__main__":
    main()
