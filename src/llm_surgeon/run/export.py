"""The export of a run: the model written, checked and timed, with report, recipe and model card."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from llm_surgeon.errors import ExportMismatchError
from llm_surgeon.evaluation.limits import speed_limits
from llm_surgeon.evaluation.speed import compare_speed
from llm_surgeon.export.format import Exported, Format
from llm_surgeon.export.formats import formats_of, loaders, main_format, possible
from llm_surgeon.export.quantising import measured_fit
from llm_surgeon.export.standard_layers import gapless
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import straighten
from llm_surgeon.models.loading import load_model
from llm_surgeon.planning.sizes import SMALL_FILES
from llm_surgeon.pruning import targets
from llm_surgeon.pruning.result import RunState
from llm_surgeon.pruning.structures import Masks
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import ExportRecord, FormatRecord, PruneReport, SpeedComparison
from llm_surgeon.report.card import model_card
from llm_surgeon.report.page import report_page
from llm_surgeon.report.plots import kept_fraction_png
from llm_surgeon.report.publish import recipe_without_paths, without_paths
from llm_surgeon.run.job import Job, report_of
from llm_surgeon.run.run_directory import RunDirectory
from llm_surgeon.system.allocator import hand_back_freed_memory
from llm_surgeon.system.files import PARTIAL, flush, readable_as_others, writing

logger = logging.getLogger(__name__)

_PROMPT, _GENERATED = 512, 32
# A share of the weights by which a result may miss its sparsity without a warning.
_MISSED = 0.01


def export_shot(job: Job, run: RunDirectory, state: RunState) -> None:
    """Export a shot that the recipe names in ``export_shots``, unless it is exported already or is the last shot."""
    shot = state.shot
    directory = run.export / f"shot-{shot}"
    if shot in job.config.export_shots and shot < job.config.shots and not directory.exists():
        beside = directory.with_name(f"{directory.name}{PARTIAL}")
        export_result(job, state, beside, run.out / directory.name)
        flush(beside)
        beside.rename(directory)


def export_result(
    job: Job,
    state: RunState,
    directory: Path,
    place: Path,
    dense: str | None = None,
    asked: PruneConfig | None = None,
) -> PruneReport:
    """Write the model as it is, check the export and time it.

    Args:
        job: The run.
        state: State of the run, with the report so far.
        directory: Directory to write to.
        place: Path that the directory will have in the end.
        dense: Source of the dense model to time the result against; None does not time it.
        asked: The recipe as it was given, if this export is its result.

    Returns:
        The report, with the export, and with speed and target if they were measured.
    """
    logger.info("writing the export and reloading it in a fresh process")
    report, keep = report_of(state), smaller(state.masks)
    exported = Exported(job.model, job.tokenizer, job.anatomy.family, job.anatomy, keep, job.files)
    described = main_format(job.config).name
    records = [_written(exported, form, directory, form.name == described) for form in formats_of(job.config)]
    main = next(record for record in records if record.name == described)
    export = ExportRecord(
        path=str(place),
        weight_bytes=main.weight_bytes,
        dense_weight_bytes=report.memory.model,
        max_logit_difference=main.max_logit_difference,
        logit_scale=main.logit_scale,
        plain=main.plain,
        formats=tuple(records),
        engines=loaders(job.config, job.anatomy.settings),
        quantising=_quantising(job),
        loader=job.anatomy.family.auto_class,
    )
    speed = _compare_speed(dense, job, keep) if dense is not None else None
    if asked is not None:
        _warn_of_missed(report, job.config)
    parameters = report.shots[-1].size.total
    target = None if asked is None else targets.reached(asked, job.model, parameters, export.weight_bytes)
    report = report.model_copy(update={"export": export, "speed": speed, "target": target})
    with writing(directory, SMALL_FILES):
        _write_report(report, job.config, directory)
    return report


def _warn_of_missed(report: PruneReport, config: PruneConfig) -> None:
    """Warn if clearly less was removed than asked for, as units are large or widths are rounded."""
    removed = report.shots[-1].sparsity
    if config.target is None and config.sparsity - removed > _MISSED:
        rounded = ", and widths are rounded (a lower --round-to comes closer)" if config.rounding != 1 else ""
        logger.warning(
            "%.1f %% of the prunable weights were removed, and %.1f %% were asked for: units go whole%s",
            *(100 * removed, 100 * config.sparsity, rounded),
        )


def _quantising(job: Job) -> tuple[str, ...]:
    """Sentences on the quantised types of llama.cpp that the matrices fit; none where it cannot have the model."""
    if not gapless(job.model) or "gguf" not in possible(job.config, job.anatomy, job.anatomy.settings):
        return ()
    return measured_fit(job.model, job.anatomy.family)


def _written(exported: Exported, form: Format, directory: Path, main: bool) -> FormatRecord:
    """Write a model in one of several formats; an engine that fails at one of them does not cost the others.

    Raises:
        ExportMismatchError: If the format is the one that report and card describe, and its engine fails.
    """
    place = directory / (form.name if form.own_directory else "")
    try:
        return write_format(exported, form, place)
    except ExportMismatchError as error:
        if main:
            raise
        logger.error("the format %s was left out: %s", form.name, error)
        shutil.rmtree(place)
        return FormatRecord(
            name=form.name,
            weight_bytes=0,
            max_logit_difference=None,
            logit_scale=None,
            plain=False,
            directory=form.name,
            failed=error.cause,
        )


def write_format(exported: Exported, form: Format, directory: Path) -> FormatRecord:
    """Write a model in one format, and verify the files.

    Args:
        exported: The model.
        form: The format.
        directory: Directory of the files, which is made if it is not there.

    Raises:
        ConfigError: If the format cannot say the model.
        DiskSpaceError: If the disk is full.
        OutputError: If writing fails for another reason.
        ExportMismatchError: If the engine computes something else than the model.
    """
    with writing(directory, sum(parameter.nbytes for parameter in exported.model.parameters())):
        directory.mkdir(parents=True, exist_ok=True)
        plain = form.write(exported, directory)
        readable_as_others(directory)
        # The reload check and the timing need the model in memory once or twice more.
        hand_back_freed_memory()
        check = form.verify(exported, directory, plain)
    return FormatRecord(
        name=form.name,
        weight_bytes=form.weight_bytes(directory),
        max_logit_difference=check.difference if check else None,
        logit_scale=check.scale if check else None,
        engine=check.engine if check else None,
        needs="" if check else form.engine,
        plain=plain,
        directory=form.name if form.own_directory else "",
        loading=form.loading(),
    )


def smaller(masks: Masks) -> dict[str, KeepMask] | None:
    """Masks of rows and columns if the matrices have shrunk; None if zeros are stored in matrices of the old shape."""
    shrunk = {name: mask for name, mask in masks.items() if isinstance(mask, KeepMask)}
    return shrunk or None


def _compare_speed(source: str, job: Job, keep: Mapping[str, KeepMask] | None) -> SpeedComparison:
    """Time the dense model, loaded once more, against the pruned one."""
    logger.info("measuring the speed of the dense and the pruned model")
    device = next(job.model.parameters()).device
    dense = load_model(source, job.config.dtype, device, job.config.trust_remote_code)
    # Both models run in the same form: a class may run all experts of a block in one product, and the run does not.
    straighten(dense, job.anatomy)
    longest = getattr(dense.config.get_text_config(), "max_position_embeddings", None) or _PROMPT + _GENERATED
    generate = min(_GENERATED, max(1, longest // 4))
    prompt = min(_PROMPT, longest - generate)
    measured = compare_speed(dense, job.model, prompt=prompt, generate=generate)
    if keep is None:
        return measured
    head_weights = job.model.get_output_embeddings().weight.numel()
    prefill, decode = speed_limits(job.anatomy, keep, head_weights, prompt)
    return measured.model_copy(update={"prefill_limit": prefill, "decode_limit": decode})


def _write_report(report: PruneReport, config: PruneConfig, directory: Path) -> None:
    report = without_paths(report)
    (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf8")
    (directory / "recipe.yaml").write_text(recipe_without_paths(config), encoding="utf8")
    (directory / "README.md").write_text(model_card(report), encoding="utf8")
    (directory / "report.html").write_text(report_page(report), encoding="utf8")
    kept_fraction_png(report, directory / "kept_fraction.png")
