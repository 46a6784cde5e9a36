"""Benchmark of the criteria by which experts go: a small mixture trained on real text, pruned to 75 and 50 % of them.

    python benchmarks/experts.py --train TEXT --evaluation TEXT [--seeds 0 1 2] [--minutes 3]

Trains a Mixtral of 8 experts in each of 4 blocks for some minutes, once for each seed, and keeps it in --work. The end
of the text is left for calibration, as a small model soon knows by heart what it was trained on. Then removes 2 or 4
experts of every block by each criterion: as they are, with reconstruction, and with all that the preset fast does after
the cut. Writes benchmarks/results/experts.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import circumstances, table, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from llm_surgeon import PruneConfig, prune
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.parts import MixturePart

EXPERTS, CHOSEN, LENGTH, BATCH, RATE = 8, 2, 256, 8, 2e-3
CRITERIA = {"curvature": "surgeon", "REAP": "reap", "mean norm": "mean-norm", "frequency": "frequency"}
# What is done after the cut, by the words of the table.
AFTER: dict[str, dict[str, Any]] = {
    "nothing": {},
    "reconstruction": {"reconstruction": True},
    "as preset fast": {"reconstruction": True, "reconstruction_copies": 0, "cross_fit": True, "gate_steps": 2},
}
GONE = (2, 4)
# Share of the text that is trained on.
TRAINED = 0.85


def main() -> None:
    """Train the mixtures, prune them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llm-surgeon-experts")
    options = parser.parse_args()
    rows, dense = [], {}
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.train.read_text(encoding="utf8")
    cut = text.index("\n", int(TRAINED * len(text)))
    options.calibration = options.work / "calibration.txt"
    options.calibration.write_text(text[cut:], encoding="utf8")
    for seed in options.seeds:
        place = options.work / f"mixture-{seed}"
        if not (place / "config.json").exists():
            train(text[:cut], place, seed, 60 * options.minutes)
        dense[seed] = json.loads((place / "training.json").read_text())
        rows += [measured(options, place, seed, *cell) for cell in cells()]
        page = report(options, rows, dense)
        write("experts", circumstances(command(options)) | {"dense": dense, "rows": rows}, page)
    print(page)


def cells() -> list[tuple[int, str, str]]:
    """Number of experts that go from each block, criterion, and what is done after the cut."""
    return [(gone, criterion, after) for gone in GONE for criterion in CRITERIA for after in AFTER]


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 2,048 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<end>"], initial_alphabet=alphabet)
    core.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", model_max_length=4 * LENGTH)


def train(text: str, place: Path, seed: int, seconds: float) -> None:
    """Train a mixture for some time and save it with its tokenizer."""
    tokenizer = tokenizer_of(text)
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        max_position_embeddings=4 * LENGTH,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    start, steps, losses = time.perf_counter(), 0, []
    while (share := (time.perf_counter() - start) / seconds) < 1:
        # Warm up, then follow a cosine to a tenth.
        rate = RATE * min(1, (steps + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[at : at + LENGTH] for at in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        steps += 1
    model.eval()
    model.config.output_router_logits = False
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    last = mean(losses[-50:])
    (place / "training.json").write_text(json.dumps({"steps": steps, "tokens": steps * BATCH * LENGTH, "loss": last}))
    print(f"seed {seed}: {steps} steps, loss {last:.3f}", flush=True)


def measured(options: argparse.Namespace, place: Path, seed: int, gone: int, criterion: str, after: str) -> Any:
    """Prune a mixture, and measure its perplexity; a measure that is in --work is not done again."""
    cell = place / f"{gone}-{criterion}-{after}.json"
    if cell.exists():
        return json.loads(cell.read_text())
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    anatomy = examine(copy.deepcopy(model), family_of("mixtral"))
    experts = sum(
        anatomy.layers[name].rows * anatomy.layers[name].columns
        for part in anatomy.parts
        if isinstance(part, MixturePart)
        for name in part.layers
    )
    config = PruneConfig.from_mapping(
        {
            **({"preset": "none"} if CRITERIA[criterion] == "surgeon" else {}),
            "method": CRITERIA[criterion],
            "structure": "experts",
            # A little more than so many experts, so that rounding leaves none of them.
            "sparsity": experts * gone / EXPERTS / anatomy.prunable_weights + 1e-6,
            "shots": 1,
            "samples": options.samples,
            "seq_len": LENGTH,
            "seed": seed,
            "calibration": str(options.calibration),
            "evaluation": str(options.evaluation),
            "eval_window": LENGTH,
            "eval_tokens": 64 * LENGTH,
            **AFTER[after],
        }
    )
    report = prune(model, tokenizer, config)
    left = {part: len(model.get_submodule(f"model.layers.{part}.mlp.experts").present) for part in range(4)}
    assert set(left.values()) == {EXPERTS - gone}, left
    row = {
        **{"seed": seed, "gone": gone, "criterion": criterion, "after": after},
        **{"dense": report.dense_perplexity.perplexity, "perplexity": report.shots[-1].perplexity.perplexity},
    }
    cell.write_text(json.dumps(row))
    print(row, flush=True)
    return row


def command(options: argparse.Namespace) -> str:
    """The command that gives the same table."""
    return (
        f"python benchmarks/experts.py --train {options.train.name} --evaluation {options.evaluation.name} --seeds "
        f"{' '.join(map(str, options.seeds))} --minutes {options.minutes:g} --samples {options.samples}"
    )


def report(options: argparse.Namespace, rows: list[dict[str, Any]], dense: dict[int, Any]) -> str:
    """The table in Markdown: perplexities of all seeds, and their mean."""
    where = circumstances(command(options))
    lines = []
    for gone, criterion, after in cells():
        found = [r["perplexity"] for r in rows if (r["gone"], r["criterion"], r["after"]) == (gone, criterion, after)]
        seeds = ", ".join(f"{value:.2f}" for value in found)
        lines.append((f"{100 - 100 * gone // EXPERTS} %", criterion, after, f"{mean(found):.2f}", seeds))
    before = {row["seed"]: row["dense"] for row in rows}
    trained = "; ".join(
        f"seed {seed}: {dense[seed]['steps']} steps, {dense[seed]['tokens'] / 1e6:.1f} M tokens, perplexity {value:.2f}"
        for seed, value in before.items()
    )
    head = (
        f"# Experts by criterion\n\nMixtral of 4 blocks with {EXPERTS} experts, {CHOSEN} for each token; trained here "
        f"({trained}). Calibrated on {options.samples} windows of {LENGTH} tokens of other text; perplexity of 64 "
        f"windows of {options.evaluation.name}. {where['date']}, {where['machine']}.\nCommand: `{where['command']}`\n\n"
    )
    return head + table(("experts left", "criterion", "after the cut", "perplexity", "by seed"), lines) + "\n"


if __name__ == "__main__":
    main()
