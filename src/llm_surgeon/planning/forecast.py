"""Forecast for the progress display: planned seconds of each phase, by the words that the display shows."""

from __future__ import annotations

from llm_surgeon.pruning.loops import loop_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import Plan
from llm_surgeon.refit.stages import phase_name, phase_names


def seconds_of_phases(plan: Plan, config: PruneConfig) -> dict[str, float]:
    """Planned seconds of each phase that the run's progress shows, by the phase's words, in order.

    All shots count as alike. Export and speed follow the last shot: the display does not show them as phases, but their
    time counts.

    Args:
        plan: The plan of the run.
        config: The recipe of the run.
    """
    planned = {phase.name: phase.seconds for phase in plan.phases}
    seconds = {"dense: perplexity": planned.get("dense evaluation", 0.0)}
    for shot in range(1, config.shots + 1):
        phases = [*loop_of(config).phases(config, shot), *phase_names(shot, config)]
        phases.append((phase_name(shot, config.shots, "perplexity"), "evaluation", 1.0))
        for words, name, share in phases:
            seconds[words] = seconds.get(words, 0.0) + share / config.shots * planned.get(name, 0.0)
    return seconds | {name: planned.get(name, 0.0) for name in ("export and check", "speed")}
