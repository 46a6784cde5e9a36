"""Texts that models write, side by side: for the terminal and for the page of a run."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llm_surgeon.records import SampleComparison
from llm_surgeon.records.names import distinct_names
from llm_surgeon.report.markup import said, table

WAYS = (("greedy", "greedy"), ("drawn", "sampled"))
# Where a model ends its text at once.
NOTHING = "(nothing)"


def sample_tables(found: SampleComparison) -> RenderableType:
    """Draw a table for each prompt, with a column for each model, for a terminal."""
    parts: list[RenderableType] = []
    names = distinct_names([model.model for model in found.models])
    for number, asked in enumerate(found.models[0].continuations):
        drawn = Table(
            title=Text(asked.prompt, style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            expand=True,
            show_lines=True,
        )
        drawn.add_column("", width=6)
        for name in names:
            drawn.add_column(Text(name), ratio=1, overflow="fold")
        for name, attribute in WAYS:
            texts = [getattr(model.continuations[number], attribute) for model in found.models]
            drawn.add_row(name, *(Text(text.strip() or NOTHING) for text in texts))
        parts.append(drawn)
    return Group(*parts, Text(_note(found), style="dim"))


def samples_section(found: SampleComparison | None) -> str:
    """Section of a run's page with the texts of each prompt."""
    if found is None:
        return said("No texts were written: llm-surgeon sample EXPORT --against MODEL --page adds them.")
    names = distinct_names([model.model for model in found.models])
    tables = [
        table(
            asked.prompt,
            ("", *names),
            [
                (name, *(getattr(model.continuations[number], attribute).strip() or NOTHING for model in found.models))
                for name, attribute in WAYS
            ],
            style="texts",
        )
        for number, asked in enumerate(found.models[0].continuations)
    ]
    return "\n".join((*tables, said(_note(found), "notes")))


def _note(found: SampleComparison) -> str:
    asked = "Messages in the tokenizer's template" if found.models[0].chat else "Beginnings of texts"
    return (
        f"{asked}; {found.tokens:,} new tokens at most. Drawn: temperature {found.temperature:g}, top-p "
        f"{found.top_p:g}, seed {found.seed}."
    )
