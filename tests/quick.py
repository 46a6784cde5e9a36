"""Runs without what takes seconds and has tests of its own."""

from llm_surgeon.export import hugging_face
from llm_surgeon.export.verify import ReloadCheck
from llm_surgeon.run import export, opening
from llm_surgeon.run import run as run_module


def without_what_has_other_tests(patch):
    """No plan, reload check, timing, page and picture; ``patch`` is pytest's monkeypatch."""
    patch.setattr(opening, "foresee", lambda *_, **__: None)
    patch.setattr(run_module, "warn_if_short", lambda _: None)
    patch.setattr(hugging_face, "verify_export", lambda *_: ReloadCheck(0.0, 1.0))
    patch.setattr(export, "_compare_speed", lambda *_: None)
    patch.setattr(export, "report_page", lambda _: "")
    patch.setattr(export, "kept_fraction_png", lambda *_: None)
