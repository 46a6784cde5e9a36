"""Going block by block is the same as going through the model."""

import pytest
import torch

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models import family_of
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.passes.sweep import Sweep
from tiny import BUILDERS, build, tokens


def calibration(padded=False):
    mask = None
    if padded:
        mask = torch.ones(8, 16, dtype=torch.bool)
        mask[::2, 10:] = False
    return CalibrationTokens(input_ids=tokens(), attention_mask=mask, provenance={})


def outputs_of_blocks(model, blocks, batch):
    """What each block gives in an ordinary pass."""
    seen, handles = [], []
    for block in model.get_submodule(blocks):
        handles.append(block.register_forward_hook(lambda _m, _i, output: seen.append(output)))
    with torch.no_grad():
        model(input_ids=batch[0], attention_mask=None if batch[1] is None else batch[1].long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return [output[0] if isinstance(output, tuple) else output for output in seen]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_sweep_gives_what_the_model_gives(family, padded):
    model, text = build(family), calibration(padded)
    blocks = family_of(model.config.model_type).blocks
    expected = [outputs_of_blocks(model, blocks, batch) for batch in text.batches(3)]
    sweep = Sweep(model, blocks, text, 3, "float32")
    for number in range(2):
        with Hooks() as hooks:
            received = []
            hooks.on_output(model.get_submodule(blocks)[number], received.append)
            sweep.watch(number, hooks)
        sweep.pass_through(number)
        for batch, whole, part in zip(sweep.batches, expected, received, strict=True):
            assert torch.equal(batch.hidden.get(), whole[number])
            # Padding is not among what is watched.
            assert torch.equal(part, whole[number].flatten(0, 1)[batch.positions])
    assert sum(len(batch.positions) for batch in sweep.batches) == (104 if padded else 128)


def test_a_block_that_returns_a_tuple_is_met_with_one(monkeypatch):
    model, text = build("llama"), calibration()
    kind = type(model.model.layers[0])
    plain = kind.forward
    expected = outputs_of_blocks(model, "model.layers", next(text.batches(8)))
    seen = []

    def forward(self, *arguments, **named):
        return (plain(self, *arguments, **named), "cache")

    def unpacked(hidden):
        seen.append(type(hidden))
        return plain_norm(hidden[0] if isinstance(hidden, tuple) else hidden)

    monkeypatch.setattr(kind, "forward", forward)
    plain_norm = model.model.norm.forward
    model.model.norm.forward = unpacked
    # A release of transformers whose model takes the first of what its blocks return.
    layers = model.model.layers
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _m, arguments: (arguments[0][0], *arguments[1:]) if isinstance(arguments[0], tuple) else arguments
        )
    sweep = Sweep(model, "model.layers", text, 8, "float32")
    assert seen == [tuple]
    for number in range(2):
        sweep.pass_through(number)
        torch.testing.assert_close(sweep.batches[0].hidden.get(), expected[number])


def test_the_model_is_as_it_was():
    model, text = build("llama"), calibration()
    model.train().requires_grad_(True)
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *arguments, **named: own(*arguments, **named)
    replaced = model.model.layers[1].forward
    sweep = Sweep(model, "model.layers", text, 3, "float32")
    sweep.pass_through(0)
    assert "forward" not in vars(model.model.layers[0])
    assert model.model.layers[1].forward is replaced
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_on_the_way_leaves_the_blocks_whole():
    model, text = build("llama"), calibration()
    text.input_ids[0, 0] = 10**6
    with pytest.raises(IndexError):
        Sweep(model, "model.layers", text, 3, "float32")
    assert all("forward" not in vars(block) for block in model.model.layers)
