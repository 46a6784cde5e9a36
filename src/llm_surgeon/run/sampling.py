"""Texts of an export beside those of another model, and on the page of its run."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from llm_surgeon.errors import ConfigError, OutputError
from llm_surgeon.evaluation.sampling import PROMPTS, QUESTIONS, Drawing, check_room, continuations, prompt_ids
from llm_surgeon.models.loading import (
    check_dtype,
    load,
    load_config,
    load_tokenizer,
    resolve_device,
    resolve_source,
)
from llm_surgeon.records import PruneReport, SampleComparison, Samples
from llm_surgeon.records.names import distinct_names
from llm_surgeon.report.page import report_page
from llm_surgeon.session.given import ready
from llm_surgeon.system.files import in_place
from llm_surgeon.system.progress import Progress, SilentProgress
from llm_surgeon.versions import versions

logger = logging.getLogger(__name__)


def sample(
    model: str | Path,
    against: str | Path | None = None,
    *,
    prompts: Sequence[str] = (),
    chat: bool | None = None,
    tokens: int = 48,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    page: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> SampleComparison:
    """Let an export, and the model that it was made of, write for the same prompts.

    The models are loaded one after the other.

    Args:
        model: An export, a local directory, a hub id, or ``demo``.
        against: The model to compare with; None for none.
        prompts: Prompts to write for; none: a fixed set.
        chat: Whether prompts are messages in the tokenizer's template; None: where the tokenizer has one.
        tokens: Largest number of new tokens.
        temperature: Temperature of the drawn texts.
        top_p: Share of the probability from whose likeliest tokens the drawn texts come.
        seed: Seed of each drawn text.
        page: Whether to put the texts on the page and into the report of the run in ``model``.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: Whether code of the checkpoint may run, if it is not an export of this package.
        progress: Display of the progress; None shows nothing.

    Raises:
        ConfigError: If the numbers cannot be, a chat is asked for without a template, or there is no run's report.
        ModelError: If a model cannot be loaded.
        NonFiniteError: If predictions are not finite.
    """
    drawing = Drawing(tokens, temperature, top_p, seed)
    check_dtype(dtype)
    resolve_device(device)
    report = _report_of(Path(model)) if page else None
    if isinstance(prompts, str):
        raise ConfigError("A text stands where a list of prompts is to be.", "Give prompts=['one', 'another'].")
    names = [str(name) for name in (against, model) if name is not None]
    sources = [resolve_source(name) for name in names]
    tokenizers = [load_tokenizer(source, trust_remote_code) for source in sources]
    without = next((name for name, own in zip(names, tokenizers, strict=True) if not own.chat_template), None)
    if chat and without is not None:
        raise ConfigError(f"The tokenizer of {without} has no template for chats.", "Leave --chat out.")
    talks = without is None if chat is None else chat
    asked = tuple(prompts) or (QUESTIONS if talks else PROMPTS)
    if any(not prompt.strip() for prompt in asked):
        raise ConfigError("A prompt is empty.", "Give it some words.")
    for source, own in zip(sources, tokenizers, strict=True):
        longest = max(prompt_ids(own, prompt, talks).shape[1] for prompt in asked)
        check_room(load_config(source, trust_remote_code), longest, tokens)
    made = []
    for name in names:
        logger.info("loading %s", name)
        network, tokenizer = load(name, dtype, device, trust_remote_code)
        with ready(network):
            written = continuations(
                network, tokenizer, asked, drawing, progress or SilentProgress(), chat=talks, words=f"texts of {name}"
            )
        made.append(Samples(model=name, chat=talks, continuations=written))
        # The next model may need the memory.
        del network
        gc.collect()
    found = SampleComparison(
        models=tuple(made), tokens=tokens, temperature=temperature, top_p=top_p, seed=seed, versions=versions()
    )
    if report is not None:
        _put_on_page(report, found, Path(model))
    return found


def _report_of(directory: Path) -> PruneReport:
    """Report of the run whose export is in a directory.

    Raises:
        ConfigError: If there is none.
    """
    try:
        return PruneReport.model_validate_json((directory / "report.json").read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        raise ConfigError(
            f"{directory} has no report.json of a run of this version, whose page could show the texts.",
            "Leave --page out, or name an export that prune made.",
        ) from None


def _put_on_page(report: PruneReport, samples: SampleComparison, directory: Path) -> None:
    """Write a run's report and page anew, with texts.

    Raises:
        OutputError: If they cannot be written.
    """
    # The report has no paths already, and what models write may hold some.
    names = distinct_names([model.model for model in samples.models])
    models = [one.model_copy(update={"model": name}) for one, name in zip(samples.models, names, strict=True)]
    report = report.model_copy(update={"samples": samples.model_copy(update={"models": tuple(models)})})
    try:
        for name, text in (
            ("report.json", f"{report.model_dump_json(indent=2)}\n"),
            ("report.html", report_page(report)),
        ):
            with in_place(directory / name) as path:
                path.write_text(text, encoding="utf8")
    except OSError as error:
        cause = f"The report in {directory} cannot be written: {error.strerror}."
        raise OutputError(cause, "Leave --page out.") from None
