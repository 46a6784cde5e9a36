"""A whole run: what is checked before, the shots, what is measured, and the export."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.config import PruneConfig
from llm_surgeon.evaluation.memory import reset_peak
from llm_surgeon.evaluation.perplexity import EvaluationText, perplexity
from llm_surgeon.evaluation.speed import compare_speed
from llm_surgeon.export.save import check_disk_space, check_output, directory_in_place, save_model, weight_bytes
from llm_surgeon.export.verify import verify_export
from llm_surgeon.models import Anatomy, examine, family_of
from llm_surgeon.models.loading import (
    DTYPES,
    load_config,
    load_model,
    load_tokenizer,
    model_type_of,
    resolve_device,
    resolve_source,
)
from llm_surgeon.pipeline.shots import Clock, ShotResult, peak_bytes, run_shots
from llm_surgeon.pipeline.structures import Masks
from llm_surgeon.pipeline.texts import Texts, evaluation_text, prepare_texts
from llm_surgeon.records import (
    ExportRecord,
    LayerRecord,
    Memory,
    Perplexity,
    PruneReport,
    ShotRecord,
    Size,
    SpeedComparison,
)
from llm_surgeon.report.card import model_card
from llm_surgeon.report.page import report_page
from llm_surgeon.report.plots import kept_fraction_png
from llm_surgeon.report.progress import Progress, SilentProgress
from llm_surgeon.selection import KeepMask

logger = logging.getLogger(__name__)

# Files of an export beside its weights: tokenizer, report, picture, modelling file.
_SMALL_FILES = 32 * 2**20
_PACKAGES = ("llm-surgeon", "torch", "transformers", "safetensors", "tokenizers", "datasets")
_PROMPT, _GENERATED = 512, 32


@dataclass(frozen=True)
class _Job:
    """What a run works on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    texts: Texts
    config: PruneConfig
    progress: Progress
    source: str


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    source: str = "",
) -> PruneReport:
    """Prune a model in place, and export it if asked.

    The model's layers are smaller afterwards; ``save_pretrained`` alone does not describe them, ``out`` does. If an
    error stops a shot half-way, some layers are pruned and others are not: start again from the dense model.

    Args:
        model: A dense causal language model of a supported family.
        tokenizer: Its tokenizer.
        config: The recipe; its ``device`` and ``dtype`` are of use when a checkpoint is loaded, not here: the model is
            pruned where it is and as it is.
        out: Directory to export to, with the reload check of ``prune_checkpoint``; must not exist, or be empty.
        progress: Where progress is shown; nowhere if None.
        source: The model's name, for the report.

    Returns:
        What was measured. Speed is not: the dense model is gone by then.

    Raises:
        UnsupportedModelError: If there is no entry for the architecture.
        DataError: If there is too little text.
        NonFiniteError: If activations, gradients or costs are not finite.
        NotPositiveDefiniteError: If a factor cannot be decomposed even with more damping.
        OutputError: If ``out`` cannot be used.
        ExportMismatchError: If the reloaded export computes something else.
    """
    if out is not None:
        check_output(out)
    anatomy = examine(model, family_of(model.config.model_type), config.ignore)
    texts = prepare_texts(tokenizer, config)
    name = source or model.config.name_or_path or type(model).__name__
    job = _Job(model, tokenizer, anatomy, texts, config, progress or SilentProgress(), name)
    report, masks = _prune(job)
    return report if out is None else _export(job, masks, report, out)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str = "demo",
    *,
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int = 20_480,
    precision: str = "bfloat16",
    progress: Progress | None = None,
) -> Perplexity:
    """Token perplexity of a model on a text.

    Args:
        model: Dense or pruned.
        tokenizer: Its tokenizer.
        data: A hub data set id, a local file, or ``demo[:en|fr|es]``, of which the part that calibration never sees
            is taken.
        window: Tokens per window.
        stride: Tokens between windows; the window if None.
        max_tokens: Tokens of the text that are used, at most.
        precision: ``bfloat16`` or ``float32``.
        progress: Where progress is shown; nowhere if None.

    Raises:
        DataError: If the text cannot be read or is shorter than a window.
        ConfigError: If the stride exceeds the window.
    """
    text = evaluation_text(tokenizer, data, window=window, stride=stride, max_tokens=max_tokens, precision=precision)
    return _measure(model, text, progress or SilentProgress(), "perplexity")


def prune_checkpoint(
    model: str,
    out: Path,
    config: PruneConfig,
    *,
    progress: Progress | None = None,
    command: str | None = None,
) -> PruneReport:
    """Prune a checkpoint, export it, check the export in a fresh process, and measure both.

    Whatever fails, nothing is left at ``out``.

    Args:
        model: A local directory, a hub id, or ``demo``.
        out: The directory to make; must not exist, or be empty.
        config: The recipe.
        progress: Where progress is shown; nowhere if None.
        command: The command line, for the report.

    Raises:
        OutputError: If ``out`` cannot be used or the disk is too full.
        ExportMismatchError: If the reloaded export computes something else.
        SurgeonError: Whatever ``prune`` raises.
    """
    check_output(out)
    device = resolve_device(config.device)
    source = resolve_source(model)
    _check_before_loading(source, out, config)
    tokenizer = load_tokenizer(source)
    texts = prepare_texts(tokenizer, config)
    network = load_model(source, config.dtype, device)
    anatomy = examine(network, family_of(network.config.model_type), config.ignore)
    job = _Job(network, tokenizer, anatomy, texts, config, progress or SilentProgress(), model)
    report, masks = _prune(job)
    return _export(job, masks, report.model_copy(update={"command": command}), out, dense=source)


def _export(job: _Job, masks: Masks, report: PruneReport, out: Path, dense: str | None = None) -> PruneReport:
    """Write the export beside its place, check and time it there, and move it; ``dense`` is what to time it against."""
    with directory_in_place(out) as beside:
        logger.info("writing the export and reloading it in a fresh process")
        save_model(job.model, job.tokenizer, job.anatomy, _smaller(masks), beside)
        check = verify_export(job.model, beside)
        export = ExportRecord(
            path=str(out),
            weight_bytes=weight_bytes(beside),
            dense_weight_bytes=report.memory.model,
            max_logit_difference=check.difference,
            logit_scale=check.scale,
        )
        # Zeros in matrices of the old shape take as long to multiply by as any number.
        speed = _compare_speed(dense, job) if dense is not None and _smaller(masks) else None
        report = report.model_copy(update={"export": export, "speed": speed})
        _write_report(report, job.config, beside)
    return report


def _check_before_loading(source: str, out: Path, config: PruneConfig) -> None:
    """Find out from the configuration alone whether the model is supported and its export fits on the disk."""
    family = family_of(model_type_of(source))
    settings = load_config(source)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(settings)
    anatomy = examine(skeleton, family, config.ignore)
    dtype = DTYPES[config.dtype] if config.dtype != "auto" else (getattr(settings, "dtype", None) or torch.float32)
    gone = config.sparsity * anatomy.prunable_weights if config.structure == "rows-columns" else 0
    kept = count_parameters(skeleton) - gone
    check_disk_space(out, int(kept * dtype.itemsize) + _SMALL_FILES)


def _smaller(masks: Masks) -> dict[str, KeepMask] | None:
    """The masks if the matrices have shrunk; None if there are zeros in matrices of the old shape."""
    shrunk = {name: mask for name, mask in masks.items() if isinstance(mask, KeepMask)}
    return shrunk or None


def _prune(job: _Job) -> tuple[PruneReport, Masks]:
    """The shots, with an evaluation before the first and after each."""
    model, anatomy, texts, config = job.model, job.anatomy, job.texts, job.config
    device = next(model.parameters()).device
    reset_peak(device)
    dense_size = Size(prunable=anatomy.prunable_weights, total=count_parameters(model))
    model_bytes = _parameter_bytes(model)
    dense_perplexity = (
        _measure(model, texts.evaluation, job.progress, "dense: perplexity") if texts.evaluation else None
    )
    peaks = [peak_bytes(device)]
    shots: list[ShotRecord] = []
    factor_bytes, masks = 0, cast(Masks, {})
    for result in run_shots(model, anatomy, texts.calibration, config, job.progress):
        masks = result.masks
        factor_bytes = max(factor_bytes, result.factor_bytes)
        shots.append(_evaluated(job, result))
        peaks += shots[-1].peaks.values()
    report = PruneReport(
        model=job.source,
        family=anatomy.family.model_type,
        config=config.model_dump(mode="json"),
        calibration=texts.calibration.provenance,
        dense_size=dense_size,
        dense_perplexity=dense_perplexity,
        shots=tuple(shots),
        layers=tuple(_layer_records(anatomy, masks)),
        memory=Memory(peak=max(peaks), model=model_bytes, factors=factor_bytes),
        versions={"python": platform.python_version()} | {package: version(package) for package in _PACKAGES},
    )
    return report, masks


def _evaluated(job: _Job, result: ShotResult) -> ShotRecord:
    """Measure the model as it is after a shot, and write the shot's record."""
    config, text = job.config, job.texts.evaluation
    clock = Clock(next(job.model.parameters()).device)
    with clock.phase("evaluation"):
        description = f"shot {result.shot}/{config.shots}: perplexity"
        measured = _measure(job.model, text, job.progress, description) if text else None
    record = _shot_record(result, job, measured, clock)
    logger.info(
        "shot %d/%d: %.1f %% of the prunable weights left%s",
        result.shot,
        config.shots,
        100 * (1 - record.sparsity),
        f", perplexity {measured.perplexity:.2f}" if measured else "",
    )
    return record


def _measure(model: PreTrainedModel, text: EvaluationText, progress: Progress, description: str) -> Perplexity:
    with progress.phase(description, len(text.windows) * text.stride) as phase:
        return perplexity(model, text, phase.advance)


def _shot_record(result: ShotResult, job: _Job, measured: Perplexity | None, evaluation: Clock) -> ShotRecord:
    dense, weights = job.anatomy.prunable_weights, sum(mask.weights for mask in result.masks.values())
    stored = sum(rows * columns for rows, columns in (mask.shape for mask in result.masks.values()))
    return ShotRecord(
        shot=result.shot,
        target_sparsity=result.target_sparsity,
        sparsity=1 - weights / dense,
        # Zeros that are stored are no parameters.
        size=Size(prunable=weights, total=count_parameters(job.model) - (stored - weights)),
        threshold=result.threshold,
        structures_removed=result.removed,
        structures_implied=result.implied,
        loss=result.loss,
        curvature_seconds=result.seconds["curvature"],
        selection_seconds=result.seconds["selection"],
        update_seconds=result.seconds["update"],
        evaluation_seconds=evaluation.seconds["evaluation"],
        perplexity=measured,
        costs=result.costs,
        peaks=result.peaks | evaluation.peaks,
    )


def _layer_records(anatomy: Anatomy, masks: Masks) -> list[LayerRecord]:
    return [
        LayerRecord(
            name=name,
            block=layer.block,
            kind=layer.kind,
            rows=masks[name].shape[0],
            columns=masks[name].shape[1],
            rows_dense=layer.rows,
            columns_dense=layer.columns,
            weights=masks[name].weights,
        )
        for name, layer in anatomy.layers.items()
    ]


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _parameter_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _compare_speed(source: str, job: _Job) -> SpeedComparison:
    """Time the dense model, loaded once more, against the pruned one."""
    logger.info("measuring the speed of the dense and the pruned model")
    dense = load_model(source, job.config.dtype, next(job.model.parameters()).device)
    longest = getattr(dense.config, "max_position_embeddings", None) or _PROMPT + _GENERATED
    generate = min(_GENERATED, max(1, longest // 4))
    return compare_speed(dense, job.model, prompt=min(_PROMPT, longest - generate), generate=generate)


def _write_report(report: PruneReport, config: PruneConfig, directory: Path) -> None:
    (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf8")
    (directory / "recipe.yaml").write_text(config.to_yaml(), encoding="utf8")
    (directory / "README.md").write_text(model_card(report), encoding="utf8")
    (directory / "report.html").write_text(report_page(report), encoding="utf8")
    kept_fraction_png(report, directory / "kept_fraction.png")
