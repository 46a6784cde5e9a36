"""Report, page and card of an export after its recovery."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from llm_surgeon.records import FormatRecord, PruneReport, RecoveryRecord
from llm_surgeon.report.card import model_card
from llm_surgeon.report.page import report_page
from llm_surgeon.report.publish import recovery_without_paths


def with_recovery(report: PruneReport, record: RecoveryRecord) -> PruneReport:
    """The report of a run whose export has been trained after it."""
    export = report.export and report.export.model_copy(
        update={
            "max_logit_difference": record.max_logit_difference,
            "logit_scale": record.logit_scale,
            # Other formats hold the weights of before, and are left out.
            "formats": tuple(_checked(form, record) for form in report.export.formats if not form.directory),
        }
    )
    # What the model writes has changed.
    return report.model_copy(update={"recovery": record, "export": export, "samples": None})


def _checked(form: FormatRecord, record: RecoveryRecord) -> FormatRecord:
    """The format with the check of the trained files."""
    return form.model_copy(
        update={"max_logit_difference": record.max_logit_difference, "logit_scale": record.logit_scale}
    )


def describe(record: RecoveryRecord, directory: Path) -> None:
    """Put a recovery into report, page and card of the run that made the export, if they are there.

    Args:
        record: The record of the recovery.
        directory: Directory of the recovered export, with the report of the run.
    """
    path = directory / "report.json"
    try:
        report = PruneReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        # A checkpoint that is no export of this version has a card of its own, or none.
        return
    report = with_recovery(report, recovery_without_paths(record))
    path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf8")
    (directory / "README.md").write_text(model_card(report), encoding="utf8")
    (directory / "report.html").write_text(report_page(report), encoding="utf8")
