"""Opening of a recovery: all that can be read and checked before a model is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from llm_surgeon.data.corpora import HUB_CHARACTERS, load_corpus
from llm_surgeon.data.sequences import TrainingTokens, training_tokens
from llm_surgeon.data.texts import held_out, text_to_evaluate
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.errors import ConfigError
from llm_surgeon.models import Family, pruned_family_of
from llm_surgeon.models.loading import (
    check_checkpoint,
    load_config,
    load_tokenizer,
    local_directory,
    model_type_of,
    source_files,
)
from llm_surgeon.models.settings import quantisation_of
from llm_surgeon.models.skeleton import quantised
from llm_surgeon.recipe.recovery import RecoverConfig
from llm_surgeon.recipe.sources import sources_of
from llm_surgeon.records import RecoveryIdentity
from llm_surgeon.recovery.objective import Objective
from llm_surgeon.recovery.preparing import (
    check_adapters,
    check_memory,
    check_same_tokens,
    check_same_vocabulary,
    check_shares,
)
from llm_surgeon.session.preconditions import check_positions, check_tokens
from llm_surgeon.system.processes import Processes
from llm_surgeon.system.progress import Progress

# Characters of a token, at most, on the average of a text.
_CHARACTERS = 8


@dataclass(frozen=True)
class Work:
    """All that a recovery has read before it loads a model.

    Attributes:
        name: Name of the export, as it was given.
        source: Directory of the export.
        teacher: Directory of the dense model; None for training on text alone.
        teacher_name: Its name, as it was given.
        config: The recipe.
        tokens: Sequences to train on.
        text: Held-out text; None evaluates nothing.
        processes: Processes that share the work.
        device: Device of this process.
        progress: Display of the progress.
    """

    name: str
    source: Path
    teacher: Path | None
    teacher_name: str | None
    config: RecoverConfig
    tokens: TrainingTokens
    text: EvaluationText | None
    processes: Processes
    device: torch.device
    progress: Progress

    @property
    def family(self) -> Family:
        """Entry of the export's architecture."""
        return pruned_family_of(model_type_of(str(self.source)))

    @property
    def objective(self) -> Objective:
        """What the export learns."""
        config = self.config
        return Objective(config.temperature, config.top_k or None, config.label_weight)

    @property
    def parameters(self) -> int:
        """Numbers in the weight files of the export."""
        return sum(parameters_of(self.source))

    @property
    def models(self) -> list[Path]:
        """Directories of the models."""
        return [self.source] if self.teacher is None else [self.source, self.teacher]

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens, as hexadecimal digits."""
        found = hashlib.sha256(self.tokens.input_ids.numpy().tobytes())
        if self.text is not None:
            found.update(self.text.tokens.numpy().tobytes())
        return found.hexdigest()

    def identity(self) -> RecoveryIdentity:
        """Identity of the recovery."""
        trusted = self.config.trust_remote_code
        return RecoveryIdentity(
            files={str(one): source_files(str(one), load_config(str(one), trusted)) for one in self.models},
            config=self.config.model_dump(mode="json"),
            texts=self.digest,
            processes=self.processes.count,
        )


def opened(
    model: str,
    teacher: str | None,
    config: RecoverConfig,
    processes: Processes,
    device: torch.device,
    progress: Progress,
) -> Work:
    """Read what a recovery needs but for the weights, and check it.

    Args:
        model: The export, as it was given.
        teacher: The dense model, as it was given; None for training on text alone.
        config: The recipe.
        processes: Processes that share the work.
        device: Device of this process.
        progress: Display of the progress.

    Raises:
        ConfigError: If something does not go together, or the memory does not suffice.
        ModelError: If a model cannot be loaded or trained.
        DataError: If a text cannot be read.
    """
    check_shares(config, processes)
    check_adapters(config)
    source = _checked(model, config)
    settings = load_config(str(source), config.trust_remote_code)
    tokenizer = load_tokenizer(str(source), config.trust_remote_code)
    dense = None
    if teacher is not None:
        dense = _checked(teacher, config)
        check_same_vocabulary(settings, load_config(str(dense), config.trust_remote_code), teacher)
        check_same_tokens(tokenizer, load_tokenizer(str(dense), config.trust_remote_code), teacher)
    evaluated = sources_of(config.evaluation or config.data) if config.evaluates else ()
    split = held_out(config.sources, evaluated)
    # Of a hub data set as much is streamed as is trained on; but where its end is held out, the end stays where it is.
    more = max(HUB_CHARACTERS, _CHARACTERS * config.tokens)
    read = {one.text: load_corpus(one.text, HUB_CHARACTERS if one.text in split else more) for one in config.sources}
    tokens = training_tokens(
        tokenizer,
        config.sources,
        split,
        sequences=config.steps * config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        bos=config.bos,
        given=read,
    )
    text = None
    if config.evaluates:
        text = text_to_evaluate(
            tokenizer,
            evaluated,
            split,
            window=config.eval_window,
            max_tokens=config.eval_tokens,
            precision=config.precision,
            bos=config.bos,
            given=read,
        )
    check_tokens(settings, [tokens.input_ids, *([text.tokens] if text is not None else [])])
    work = Work(model, source, dense, teacher, config, tokens, text, processes, device, progress)
    check_memory(work.parameters, bytes_of(source), bytes_of(dense), config, device, processes)
    return work


def _checked(model: str, config: RecoverConfig) -> Path:
    """Directory of a model that can be loaded, has the positions, and is of a supported architecture.

    Raises:
        ModelError: If it cannot be, is not, or is quantised.
        ConfigError: If it has learned fewer positions.
    """
    source = local_directory(model)
    check_checkpoint(str(source), config.trust_remote_code)
    pruned_family_of(model_type_of(str(source)))
    settings = load_config(str(source), config.trust_remote_code)
    if (how := quantisation_of(settings)) is not None:
        raise quantised(model, how)
    check_positions(
        settings, {"seq_len": config.seq_len} | ({"eval_window": config.eval_window} if config.evaluates else {})
    )
    return source


def bytes_of(directory: Path | None) -> int:
    """Bytes of the weight files in a directory; 0 without one."""
    return 0 if directory is None else sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def parameters_of(directory: Path) -> Iterator[int]:
    """Yield the numbers of each tensor in the weight files of a directory."""
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield math.prod(file.get_slice(name).get_shape())


def check_same_everywhere(work: Work) -> None:
    """Make sure that all processes have read the same, as each reads from its own machine; all have to call this.

    Raises:
        ConfigError: If they have not, in every process.
    """
    sizes = [sorted((path.name, path.stat().st_size) for path in one.glob("*.safetensors")) for one in work.models]
    own = json.dumps([work.digest, work.config.model_dump(mode="json"), sizes])
    differs = own != work.processes.broadcast(own, 0)
    if work.processes.total(float(differs))[0]:
        raise ConfigError(
            "The processes have read different texts or weights.", "Give the same files and options on all machines."
        )
