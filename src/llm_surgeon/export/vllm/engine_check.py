"""Run with the Python of an environment that has vLLM: generate greedily from prompts, with log-probabilities.

Usage: ``python engine_check.py DIRECTORY JOB auto|transformers``. JOB is a JSON file with ``prompts``, lists of token
ids, and ``tokens``, the number of tokens to generate; the result is written beside it, as JOB.out: the version of vLLM,
and for each prompt ``tokens`` and ``top``, the log-probabilities of the likeliest tokens of each step.
"""

import json
import os
import sys
import threading
from pathlib import Path

# A small model on a few threads: everything in this process, 1 GiB for keys and values, and nothing from a hub.
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def end_with_parent() -> None:
    """End this process when the one that asked for it has ended, be it by a kill: standard input ends with it."""
    os.read(0, 1)
    os._exit(1)


def main(directory: str, job: str, implementation: str) -> None:
    """Generate, and write the tokens and the log-probabilities."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams
    from vllm.version import __version__

    asked = json.loads(Path(job).read_text(encoding="utf8"))
    longest = max(len(prompt) for prompt in asked["prompts"]) + asked["tokens"]
    engine = LLM(
        directory,
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=len(asked["prompts"]),
        max_num_batched_tokens=max(256, longest),
        trust_remote_code=True,
        model_impl=implementation,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], logprobs=5, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    results = [
        {
            "tokens": list(answer.outputs[0].token_ids),
            "top": [{token: value.logprob for token, value in step.items()} for step in answer.outputs[0].logprobs],
        }
        for answer in engine.generate(prompts, sampling, use_tqdm=False)
    ]
    Path(f"{job}.out").write_text(json.dumps({"version": __version__, "results": results}), encoding="utf8")


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    main(*sys.argv[1:])
