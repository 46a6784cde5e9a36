"""Report, page and card of an export after its recovery."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from llm_surgeon.records import FormatRecord, PruneReport, RecoveryRecord
from llm_surgeon.report.card import model_card
from llm_surgeon.report.page import report_page
from llm_surgeon.report.recovery_table import recovery_in_card

logger = logging.getLogger(__name__)


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
    """Put a recovery into report, page and card of the run that made the export, as far as they are there.

    Args:
        record: The record of the recovery, without paths.
        directory: Directory of the recovered export, with the report of the run.
    """
    path, card = directory / "report.json", directory / "README.md"
    report = _read(path)
    if report is not None:
        report = with_recovery(report, record)
        path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf8")
        card.write_text(model_card(report), encoding="utf8")
        (directory / "report.html").write_text(report_page(report), encoding="utf8")
        return
    if path.exists():
        logger.warning("the report of the export is of another version, and is left out")
        for name in ("report.json", "report.html"):
            (directory / name).unlink(missing_ok=True)
    if card.exists():
        text = card.read_text(encoding="utf8", errors="replace")
        card.write_text(f"{text.rstrip()}\n\n{recovery_in_card(record)}", encoding="utf8")


def _read(path: Path) -> PruneReport | None:
    try:
        return PruneReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
