"""The stage that reconstructs the residual stream after a shot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import nn

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.passes.batch_major import Estimation
from llm_surgeon.passes.head import AT_ONCE, CHUNK
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import Figure
from llm_surgeon.refit.cross_fit import half_of
from llm_surgeon.refit.last_norm import last_norm_parameters
from llm_surgeon.refit.reconstruction import DENSE_RUNS, PRUNED_RUNS, Reconstruction, check_stream, reconstruct
from llm_surgeon.refit.resampled_text import with_copies
from llm_surgeon.refit.stage import Advance, Fitted, Order, Parts, Shot, Stage, TracedBytes
from llm_surgeon.session.session import Session

# Number of float32 tensors of a few logits in the computation of the last norm's scale, and of copies.
_OF_FEW = 4


class ReconstructionStage(Stage):
    """Reconstruction: least squares on the layers that write into the residual stream, and a scale of the last norm."""

    name = "reconstruction"
    half = "own"
    needs_dense = True
    sweeps = True
    decomposes = True
    waits = "hidden states"

    @classmethod
    def wanted(cls, config: PruneConfig) -> bool:
        """Whether a recipe reconstructs."""
        return config.reconstruction

    @classmethod
    def check_model(cls, session: Session) -> None:
        """Check that a block adds the outputs of its parts to the stream; see ``check_stream``."""
        check_stream(session)

    @classmethod
    def changes(cls, model: nn.Module, anatomy: Anatomy) -> list[str]:
        """Names of the parameters of the last norm."""
        return last_norm_parameters(model, anatomy)

    def begin(self) -> None:
        """Write the copies of the text."""
        _ = self._text

    def work(self, shot: Shot, half: int | None) -> int:
        """Number of tokens of text and copies that go through the blocks of both models."""
        return self._tokens(half).input_ids.numel() * self.session.anatomy.blocks * (DENSE_RUNS + PRUNED_RUNS)

    def fit(self, shot: Shot, half: int | None, advance: Advance) -> Fitted:
        """Correct the layers that write into the stream, by all sequences or by half of them."""
        config, tokens = self.session.config, self._tokens(half)
        how = Reconstruction(config.reconstruction_ridge, config.sequences_per_pass, config.precision)
        text = tokens.n_samples // (1 + config.reconstruction_copies)
        found = reconstruct(self.session, shot.keep, how, tokens, text=text, advance=advance, steps=shot.steps)
        return Fitted(
            (
                Figure(name="error of the stream", value=found.relative_error, kind="share"),
                Figure(name="scale of predictions", value=found.scale),
            ),
            "The error of the stream is what the last block's output misses of the dense model's after "
            "reconstruction, in root mean square, relative to it. By the scale the last norm was multiplied, for "
            "predictions that are as sure as they are right.",
        )

    def _tokens(self, half: int | None) -> CalibrationTokens:
        return half_of(self._text, half, self.session.own.n_samples)

    @cached_property
    def _text(self) -> CalibrationTokens:
        """Calibration tokens of this process, and copies of them."""
        session, config = self.session, self.session.config
        copies, own = config.reconstruction_copies, session.own
        if not copies:
            return own
        assert session.dense is not None, "the dense model writes the copies"
        how = Estimation(config.sequences_per_pass, config.precision, seed=config.seed)
        blocks, share = session.anatomy.family.blocks, config.reconstruction_share
        with session.progress.phase("copies of the calibration text", own.input_ids.numel()) as phase:
            return with_copies(session.dense, blocks, own, copies, share, how, session.store, phase.advance)

    @classmethod
    def memory(cls, skeleton: Skeleton, config: PruneConfig, traced: TracedBytes) -> Parts:
        """Bytes of a pass, or of logits at the end; and of what both models' blocks are called with."""
        vocabulary: int = skeleton.network.get_output_embeddings().weight.shape[0]
        tokens = min(CHUNK, config.sequences_per_pass * config.seq_len)
        logits = tokens * vocabulary
        passes = max(traced.watching, 4 * (logits + _OF_FEW * min(AT_ONCE, logits)))
        return {"passes": passes + 2 * traced.waiting}

    @classmethod
    def waiting(cls, skeleton: Skeleton, config: PruneConfig, order: Order) -> int:
        """Bytes of both models' streams, and of the dense stream inside a block and behind it.

        Behind the attention the dense stream is float32; before, the attention's output waits in the type of the
        arithmetic, and the stream in front of the block still waits too.
        """
        tokens = config.samples * (1 + config.reconstruction_copies) * config.seq_len // config.parts_of_text
        states, inside = skeleton.state_bytes(tokens), 4 * skeleton.hidden_size * tokens
        added = inside if config.precision == "float32" else inside // 2
        return 2 * states + max(inside, states + added)

    @classmethod
    def operations(cls, skeleton: Skeleton, config: PruneConfig, kept: Sequence[float], order: Order) -> float:
        """Operations of the runs of both models' blocks, and of the pass that writes copies."""
        prunable = skeleton.anatomy.prunable_weights
        # One of the runs of the pruned model ends behind the attention.
        pruned = PRUNED_RUNS * prunable - _feed_forward_weights(skeleton)
        runs = sum(DENSE_RUNS * prunable + share * pruned for share in kept)
        copies = config.reconstruction_copies
        writing = skeleton.parameters if copies else 0
        return 2 * ((1 + copies) * runs + writing) * config.samples * config.seq_len


def _feed_forward_weights(skeleton: Skeleton) -> int:
    """Number of prunable weights behind the first part of each block, which is the attention."""
    anatomy = skeleton.anatomy
    first = {part.block: set(part.layers) for part in reversed(anatomy.located)}
    layers = anatomy.layers.items()
    return sum(layer.rows * layer.columns for name, layer in layers if name not in first[layer.block])
