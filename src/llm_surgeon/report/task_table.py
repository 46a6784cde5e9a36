"""Scores of tasks as a table for the terminal: a row for each task, the mean, and notes."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from llm_surgeon.records import TaskMetric, TaskScore, TaskScores

_HEADINGS = ("task", "acc", "acc_norm", "other metrics", "samples")
_OWN_COLUMNS = ("acc", "acc_norm")


def task_table(model: str, scores: TaskScores) -> Table:
    """Draw the tasks of one model for a terminal of 100 columns, with notes on the way of measuring below."""
    table = Table(
        title=Text(model),
        caption=Text("\n".join(task_notes(scores))),
        title_justify="left",
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
    )
    for number, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if number else "left")
    for score in scores.scores:
        table.add_row(*_row(score))
    for failure in scores.failures:
        # The cause is printed to standard error, and is in the JSON file.
        table.add_row(failure.task, "failed", "", "", "")
    if scores.mean is not None:
        table.add_section()
        mean = f"{100 * scores.mean:.2f} %"
        # The mean is in the column of acc only if all accuracies are acc.
        of_acc = all(score.accuracy in (None, "acc") for score in scores.scores)
        table.add_row("mean", *((mean, "", "", "") if of_acc else ("", "", mean, "")))
    return table


def task_notes(scores: TaskScores) -> list[str]:
    """Notes on the mean and the tasks that it lacks, on reservations about the scores, and on the way of measuring."""
    return [*_notes_on_the_mean(scores), *_reservations(scores), *_notes_on_measuring(scores)]


def _notes_on_the_mean(scores: TaskScores) -> list[str]:
    averaged = [score for score in scores.scores if score.accuracy is not None]
    others = [score for score in averaged if score.accuracy != "acc"]
    without = [score.task for score in scores.scores if score.accuracy is None]
    if not averaged:
        return ["No mean: no task gave an accuracy."]
    asked = len(scores.scores) + len(scores.failures)
    notes = [f"Mean: plain mean of acc over {len(averaged)} of the {asked} tasks asked for, each counting the same."]
    if others:
        notes.append(f"Instead of acc: {', '.join(f'{score.task} {score.accuracy}' for score in others)}.")
    if without:
        notes.append(f"Not in the mean, for want of an accuracy: {', '.join(without)}.")
    return notes


def _reservations(scores: TaskScores) -> list[str]:
    notes = []
    if scores.limit is not None and any(score.samples < score.samples_total for score in scores.scores):
        notes.append(f"Only the first {scores.limit:,} samples of each task: an estimate.")
    drawn = [_drawn(score) for score in scores.scores if score.examples_measured]
    if drawn:
        notes.append(f"Solved examples come from the measured samples, without the question's own: {', '.join(drawn)}.")
    return notes


def _drawn(score: TaskScore) -> str:
    """Name of a task whose solved examples are measured samples, with the number of these if not all are."""
    if score.examples_measured == score.examples:
        return score.task
    return f"{score.task} ({score.examples_measured:,} of {score.examples:,})"


def _notes_on_measuring(scores: TaskScores) -> list[str]:
    if not scores.scores:
        return []
    shots = ", ".join(str(number) for number in sorted({score.shots for score in scores.scores}))
    template = ", chat template" if scores.chat_template else ""
    return [
        f"lm-eval {scores.lm_eval}, {shots} solved examples{template}, seed {scores.seed}, {scores.precision} "
        f"arithmetic, batch {scores.batch_size}; \N{PLUS-MINUS SIGN} is one standard error."
    ]


def _row(score: TaskScore) -> tuple[str, ...]:
    own = [_percent(score.metrics.get(name)) for name in _OWN_COLUMNS]
    others = [f"{name} {_other(metric)}" for name, metric in score.metrics.items() if name not in _OWN_COLUMNS]
    samples = f"{score.samples:,}"
    if score.samples != score.samples_total:
        samples += f" of {score.samples_total:,}"
    return (score.task, *own, "\n".join(others), samples)


def _percent(metric: TaskMetric | None) -> str:
    if metric is None:
        return ""
    error = "" if metric.stderr is None else f" \N{PLUS-MINUS SIGN} {100 * metric.stderr:.2f}"
    return f"{100 * metric.value:.2f}{error} %"


def _other(metric: TaskMetric) -> str:
    """Write a metric in its own scale, which is no percentage."""
    error = "" if metric.stderr is None else f" \N{PLUS-MINUS SIGN} {metric.stderr:.4g}"
    return f"{metric.value:.4g}{error}"
