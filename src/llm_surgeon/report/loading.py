"""Lines of Python that load an export, and the reason for their arguments."""

from __future__ import annotations

from llm_surgeon.records import FormatRecord, PruneReport

_SMALLER = (
    "What was removed is gone from the files, layer by layer, so the checkpoint brings its own modelling file: hence "
    "`trust_remote_code`."
)
_PLAIN = "What was removed is gone from the files, equally in all layers, so that the configuration says it all."
_ZEROS = (
    "The weights that were removed are zeros in matrices of the old shape: the files are as large as the dense "
    "model's, and it runs no faster, unless what runs it makes use of the zeros (2:4 patterns on some GPUs, for "
    "example)."
)


def loading_lines(report: PruneReport, place: str) -> list[str]:
    """Lines of Python that load the export of a run: three lines if ``from_pretrained`` loads it.

    Args:
        report: Report of the run.
        place: Path of the export as a Python literal, with its quotes.
    """
    if (form := _only_format(report)) is not None:
        inside = f"{place[:-1]}/{form.directory}{place[-1]}"
        lines = form.loading or (f"# Format {form.name}, in {{place}}",)
        return [line.replace("{place}", inside) for line in lines]
    trust = ", trust_remote_code=True" if brings_code(report) else ""
    loader = "AutoModelForCausalLM" if report.export is None else report.export.loader
    return [
        f"from transformers import {loader}, AutoTokenizer",
        f"model = {loader}.from_pretrained({place}{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained({place}{trust})",
    ]


def reloaded(form: FormatRecord) -> str:
    """Result of loading the files of a format again, in one sentence."""
    if form.failed is not None:
        return f"The format {form.name} was left out: {form.failed}"
    if form.max_logit_difference is None:
        needed = f" That needs {form.needs}." if form.needs else ""
        return f"The files of the format {form.name} were not loaded again, as their engine is not installed.{needed}"
    by = f" by {form.engine}" if form.engine else ""
    return (
        f"Loaded again from disk{by}, its logits differ from those of the model in memory by "
        f"{form.max_logit_difference:.1e} at most, on a scale of {form.logit_scale:.3g}."
    )


def using_lines(report: PruneReport) -> list[str]:
    """Lines of Python that let the loaded model write a few words; none where ``from_pretrained`` loads none."""
    if _only_format(report) is not None:
        return []
    return [
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
    ]


def _only_format(report: PruneReport) -> FormatRecord | None:
    """The first format of an export that ``from_pretrained`` cannot load; None if it can."""
    return None if report.export is None or report.export.pretrained else report.export.formats[0]


def brings_code(report: PruneReport) -> bool:
    """Whether loading the export runs a modelling file of its own."""
    return report.smaller and _only_format(report) is None and not (report.export is not None and report.export.plain)


def why_so(report: PruneReport) -> str:
    """Reason for the arguments of the lines that load the export, in Markdown."""
    if (form := _only_format(report)) is not None:
        return f"The files are those of the format `{form.name}` alone, so that `from_pretrained` does not load them."
    if brings_code(report):
        return _SMALLER
    return _PLAIN if report.smaller else _ZEROS
