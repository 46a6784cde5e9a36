"""Runs of a model compiled with ``torch.compile``, for timing: no timed run compiles anything."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from llm_surgeon.evaluation.speed import Rates, Run, cache_argument, pass_options, time_run


def compiled_run(model: PreTrainedModel, token_ids: Tensor, generate: int) -> tuple[Run, float]:
    """Compile a model for one size of prompts, and run it until nothing is left to compile.

    The cache has a fixed size, so that each step of decoding is the same program; its attention reads all
    ``prompt + generate`` positions in each step, where the cache of an eager run grows.

    Args:
        model: The model, ready to be timed.
        token_ids: The prompts ``[batch, prompt]``.
        generate: Tokens per sequence decoded.

    Returns:
        The run, and the seconds of the first one, in which the model was compiled. They are fewer where torch has an
        earlier compilation in its cache on disk.

    Raises:
        Exception: Any error of the compiler, of many kinds; also if the model would be compiled anew in each run.
    """
    cache = StaticCache(config=model.config, max_cache_len=token_ids.shape[1] + generate)
    options = pass_options(model) | {cache_argument(model): cache}
    # The first pass lays the cache out; if it were compiled, it would be a program of its own.
    model(input_ids=token_ids, **options)
    # Two models may share their code. Without this, torch would compile the second one for prompts of any length,
    # because it has met two lengths in the first one: prompts and single tokens.
    torch._dynamo.mark_static(token_ids)
    forward = torch.compile(model.forward)

    def run() -> Rates:
        cache.reset()
        return time_run(forward, token_ids, generate, options)

    start = perf_counter()
    # Without this patch, torch would go on uncompiled once it has compiled a function too often, and would remember the
    # sizes of earlier processes.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, automatic_dynamic_local_pgo=False):
        run()
    seconds = perf_counter() - start
    with torch.compiler.set_stance("fail_on_recompile"):
        run()
    return run, seconds
