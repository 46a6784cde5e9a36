"""Run in a fresh process: load a GGUF file in llama.cpp, and answer what the exporter wants compared.

Usage: ``python -P engine_check.py REQUEST``. REQUEST is a JSON file with ``model``, the path of the GGUF file, the
number of ``threads``, and the questions. The answers are written beside it, as JSON, under the names of the questions:

- ``tokenize``: a list of texts, each with whether special tokens are added; the answer is a list of token ids for each.
- ``continue``: ``prompts``, lists of token ids, ``steps``, the number of tokens that are to follow, and ``vocabulary``,
  the number of tokens that there are. The answer for each prompt is ``tokens``, those that followed, and ``logprobs``,
  for each of them the logarithms of the probabilities of all tokens in its place, by their ids.

llama.cpp ends the process that loads a file it refuses, hence a process of its own. The script imports nothing of this
package.
"""

import http.client
import json
import os
import secrets
import sys
import threading
import traceback
from typing import Any
from urllib.parse import urlsplit


def end_with_parent() -> None:
    """End this process when the one that asked for it has ended, be it by a kill: standard input ends with it."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    # Before the imports, which take a while.
    threading.Thread(target=end_with_parent, daemon=True).start()

import xllamacpp  # noqa: E402

# A server that is deleted may wait for ever for its threads, so that none is deleted.
_RUNNING: list[Any] = []


class Engine:
    """A GGUF file in a server of llama.cpp that listens on this machine only, on the CPU.

    Args:
        model: The file.
        threads: Threads that compute.
    """

    def __init__(self, model: str, threads: int) -> None:
        # Other users of this machine reach the port too, but do not know the key.
        key = secrets.token_hex(16)
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        self.server = xllamacpp.Server(_parameters(model, key, threads))
        place = urlsplit(self.server.listening_address)
        self._place = str(place.hostname), place.port

    def post(self, path: str, question: dict[str, Any]) -> dict[str, Any]:
        """Ask the server; raises ``RuntimeError`` with its message if it refuses."""
        # A connection for each question: on a busy machine, the server has ended an idle one before the next.
        connection = http.client.HTTPConnection(*self._place, timeout=600)
        try:
            connection.request("POST", path, json.dumps(question), self._headers)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise RuntimeError(f"{path} answers {response.status}: {body.decode(errors='replace')[:200]}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def tokens(self, text: str, special: bool) -> list[int]:
        """Token ids of a text, in which special tokens are recognized; ``special`` adds those at its ends."""
        answer = self.post("/tokenize", {"content": text, "add_special": special, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def followed(self, prompt: list[int], steps: int, vocabulary: int) -> dict[str, Any]:
        """Tokens that follow a prompt, with the probabilities of all others.

        The server says nothing of tokens that are parts of a character, so that one is chosen for it that is none. The
        probabilities are those before the choice.
        """
        question = {
            "prompt": prompt,
            "n_predict": steps,
            "n_probs": vocabulary,
            "temperature": 0,
            "logit_bias": [[self.tokens("a", False)[-1], 1e6]],
            "cache_prompt": False,
            "return_tokens": True,
        }
        answer = self.post("/completion", question)
        logprobs = []
        for step in answer["completion_probabilities"]:
            found = {int(token["id"]): float(token["logprob"]) for token in step["top_logprobs"]}
            logprobs.append([found[token] for token in range(vocabulary)])
        return {"tokens": [int(token) for token in answer["tokens"]], "logprobs": logprobs}


def _parameters(model: str, key: str, threads: int) -> Any:
    """Parameters of a server that does as little as possible besides answering."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.api_keys = [key]
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    for of in (parameters.cpuparams, parameters.cpuparams_batch):
        # Threads that wait for work ask for it again and again by default, and keep others from the cores.
        of.n_threads, of.poll = threads, 0
    # Keys, values and their products are not to be rounded.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # What fits is not looked for, and nothing is copied or computed in advance.
    parameters.fit_params = False
    parameters.warmup = False
    parameters.no_extra_bufts = True
    return parameters


def main(request: str) -> None:
    """Answer the questions of a request."""
    with open(request, encoding="utf-8") as file:
        questions = json.load(file)
    engine = Engine(questions["model"], questions["threads"])
    _RUNNING.append(engine)
    answers: dict[str, Any] = {}
    if "tokenize" in questions:
        answers["tokenize"] = [engine.tokens(text, special) for text, special in questions["tokenize"]]
    if "continue" in questions:
        asked = questions["continue"]
        answers["continue"] = [
            engine.followed(prompt, asked["steps"], asked["vocabulary"]) for prompt in asked["prompts"]
        ]
    with open(f"{request}.out", "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    status = 1
    try:
        main(*sys.argv[1:])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Without the end of the interpreter, which would wait for the server's threads.
        sys.stderr.flush()
        os._exit(status)
