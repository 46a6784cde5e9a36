"""A whole run: what is checked before, the shots, what is measured, and the export."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.config import PruneConfig
from llm_surgeon.errors import ConfigError
from llm_surgeon.evaluation.limits import speed_limits
from llm_surgeon.evaluation.speed import compare_speed
from llm_surgeon.export.place import check_disk_space, check_output, directory_in_place
from llm_surgeon.export.save import save_model, weight_bytes
from llm_surgeon.export.verify import verify_export
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.loading import (
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_source,
)
from llm_surgeon.pipeline.corrections import require_peft
from llm_surgeon.pipeline.job import Job, count_parameters, measure, run_job
from llm_surgeon.pipeline.structures import Masks, check_structure
from llm_surgeon.pipeline.targets import count_based, latency_based, reached
from llm_surgeon.pipeline.texts import evaluation_text, prepare_texts
from llm_surgeon.planning.plan import foresee, warn_if_short
from llm_surgeon.planning.sizes import disk_bytes
from llm_surgeon.planning.skeleton import settled, skeleton_of
from llm_surgeon.records import (
    ExportRecord,
    Perplexity,
    PruneReport,
    SpeedComparison,
)
from llm_surgeon.report.card import model_card
from llm_surgeon.report.page import report_page
from llm_surgeon.report.plots import kept_fraction_png
from llm_surgeon.report.progress import Progress, SilentProgress
from llm_surgeon.selection import KeepMask

logger = logging.getLogger(__name__)

_PROMPT, _GENERATED = 512, 32


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
    elif config.export_shots:
        raise ConfigError("Shots are to be exported, but there is no place to export to.", "Give out=Path(...).")
    if config.lora:
        require_peft()
    anatomy = examine(model, family_of(model.config.model_type), config.ignore)
    resolved = count_based(config, anatomy, count_parameters(model), model.dtype.itemsize)
    check_structure(resolved, anatomy)
    texts = prepare_texts(tokenizer, config)
    resolved = latency_based(resolved, model, anatomy)
    name = source or model.config.name_or_path or type(model).__name__
    job = Job(model, tokenizer, anatomy, texts, resolved, progress or SilentProgress(), name)
    return run_job(job)[0] if out is None else _prune_into(job, out, asked=config)


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
    return measure(model, text, progress or SilentProgress(), "perplexity")


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
    if config.lora:
        require_peft()
    device = resolve_device(config.device)
    source = resolve_source(model)
    skeleton = skeleton_of(source, config)
    resolved = settled(skeleton, config)
    check_disk_space(out, disk_bytes(skeleton, resolved))
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    texts = prepare_texts(tokenizer, config)
    # What a latency comes to is only known once the model has been timed.
    foreseen = foresee(model, skeleton, resolved, device, texts) if resolved.target is None else None
    if foreseen is not None:
        warn_if_short(foreseen)
    network = load_model(source, config.dtype, device, config.trust_remote_code)
    anatomy = examine(network, family_of(network.config.model_type), config.ignore)
    resolved = latency_based(resolved, network, anatomy)
    job = Job(network, tokenizer, anatomy, texts, resolved, progress or SilentProgress(), model, command, foreseen)
    return _prune_into(job, out, config, dense=source)


def _prune_into(job: Job, out: Path, asked: PruneConfig, dense: str | None = None) -> PruneReport:
    """Prune, and export beside the final place before moving there.

    Args:
        job: What to work on.
        out: The final place.
        asked: The recipe as it was given.
        dense: What to time the result against.
    """
    with directory_in_place(out) as beside:

        def keep_shot(report: PruneReport, masks: Masks) -> None:
            shot = len(report.shots)
            if shot in job.config.export_shots and shot < job.config.shots:
                _export(job, masks, report, beside / f"shot-{shot}", out / f"shot-{shot}")

        report, masks = run_job(job, keep_shot)
        # Zeros in matrices of the old shape take as long to multiply by as any number.
        timed = dense if _smaller(masks) else None
        return _export(job, masks, report, beside, out, timed, asked)


def _export(
    job: Job,
    masks: Masks,
    report: PruneReport,
    directory: Path,
    place: Path,
    dense: str | None = None,
    asked: PruneConfig | None = None,
) -> PruneReport:
    """Write the model as it is, check it and time it.

    Args:
        job: What was worked on.
        masks: What is left.
        report: What is known so far.
        directory: Where to write.
        place: Where the directory will be in the end.
        dense: What to time the result against.
        asked: The recipe as it was given, if this is its result.
    """
    logger.info("writing the export and reloading it in a fresh process")
    directory.mkdir(exist_ok=True)
    form = save_model(job.model, job.tokenizer, job.anatomy, _smaller(masks), directory)
    check = verify_export(job.model, directory, form.plain)
    export = ExportRecord(
        path=str(place),
        weight_bytes=weight_bytes(directory),
        dense_weight_bytes=report.memory.model,
        max_logit_difference=check.difference,
        logit_scale=check.scale,
        plain=form.plain,
    )
    speed = _compare_speed(dense, job, _smaller(masks)) if dense is not None else None
    parameters = report.shots[-1].size.total
    target = None if asked is None else reached(asked, job.model, parameters, export.weight_bytes)
    report = report.model_copy(update={"export": export, "speed": speed, "target": target})
    _write_report(report, job.config, directory)
    return report


def _smaller(masks: Masks) -> dict[str, KeepMask] | None:
    """The masks if the matrices have shrunk; None if there are zeros in matrices of the old shape."""
    shrunk = {name: mask for name, mask in masks.items() if isinstance(mask, KeepMask)}
    return shrunk or None


def _compare_speed(source: str, job: Job, keep: Mapping[str, KeepMask] | None) -> SpeedComparison:
    """Time the dense model, loaded once more, against the pruned one."""
    logger.info("measuring the speed of the dense and the pruned model")
    device = next(job.model.parameters()).device
    dense = load_model(source, job.config.dtype, device, job.config.trust_remote_code)
    longest = getattr(dense.config, "max_position_embeddings", None) or _PROMPT + _GENERATED
    generate = min(_GENERATED, max(1, longest // 4))
    prompt = min(_PROMPT, longest - generate)
    measured = compare_speed(dense, job.model, prompt=prompt, generate=generate)
    if keep is None:
        return measured
    head_weights = job.model.get_output_embeddings().weight.numel()
    prefill, decode = speed_limits(job.anatomy, keep, head_weights, prompt)
    return measured.model_copy(update={"prefill_limit": prefill, "decode_limit": decode})


def _write_report(report: PruneReport, config: PruneConfig, directory: Path) -> None:
    (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf8")
    (directory / "recipe.yaml").write_text(config.to_yaml(), encoding="utf8")
    (directory / "README.md").write_text(model_card(report), encoding="utf8")
    (directory / "report.html").write_text(report_page(report), encoding="utf8")
    kept_fraction_png(report, directory / "kept_fraction.png")
