"""Run in a fresh process: load an export as a stranger would, and compute what the exporter wants compared.

Usage: ``python reload_check.py DIRECTORY PROBE DEVICE LOADER plain|trusted whole|lean``. PROBE is a safetensors file
with ``input_ids [1, n]``; the logits are written beside it. LOADER is the name of a class in transformers. ``trusted``
may run code of the checkpoint. ``lean`` keeps no weights in memory that the mapped file has, for models that do not
fit. This package is made unimportable first: the export must not need it.
"""

import ctypes
import mmap
import os
import sys
import threading
from typing import Any

sys.modules["llm_surgeon"] = None  # type: ignore[assignment]


def end_with_parent() -> None:
    """End this process when the one that asked for it has ended, be it by a kill: standard input ends with it."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    # Before the imports, which take seconds.
    threading.Thread(target=end_with_parent, daemon=True).start()

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

# Advice to the kernel to take pages back: those of a file are dropped, others stay where nothing can be swapped out.
_PAGE_OUT = 21


def forget_after_use(model: torch.nn.Module) -> None:
    """Let the kernel take back the weights of each layer after it has run; they are read again from the mapped file."""
    if not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None).madvise

    def forget(module: torch.nn.Module, *_call: Any) -> None:
        for tensor in module.parameters(recurse=False):
            # Whole pages inside the tensor.
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if size > 0:
                advise(ctypes.c_void_p(start), ctypes.c_size_t(size), _PAGE_OUT)

    for module in model.modules():
        module.register_forward_hook(forget)


def main(directory: str, probe: str, device: str, loader: str, code: str, memory: str) -> None:
    """Write the logits of one full pass, of a cached step, and a few generated tokens."""
    ids = load_file(probe)["input_ids"].to(device)
    auto = getattr(transformers, loader)
    model = auto.from_pretrained(directory, trust_remote_code=code == "trusted", dtype="auto").eval().to(device)
    if memory == "lean":
        forget_after_use(model)
    with torch.inference_mode():
        logits = model(ids).logits
        prefill = model(ids[:, :-1], use_cache=True)
        # By the name that this version of transformers has for it.
        name = "cache" if hasattr(prefill, "cache") else "past_key_values"
        step = model(ids[:, -1:], use_cache=True, **{name: getattr(prefill, name)}).logits
        # Settings of its own: those of the checkpoint may be such that they cannot be used.
        greedy = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        generated = model.generate(ids[:, :4], generation_config=greedy)
    result = {"logits": logits, "step": step, "generated": generated}
    save_file({name: tensor.cpu().clone().contiguous() for name, tensor in result.items()}, probe + ".out")


if __name__ == "__main__":
    main(*sys.argv[1:])
