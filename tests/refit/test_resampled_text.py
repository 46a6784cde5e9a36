"""Copies of calibration text in which a model has written some of the tokens."""

import torch

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.passes.batch_major import Estimation
from llm_surgeon.refit.resampled_text import with_copies
from llm_surgeon.system.storage import Budgets, TensorStore
from tiny import build, tokens

TEXT = CalibrationTokens(tokens(8, 16), None, {})
HOW = Estimation(batch_size=3, precision="float32")
BLOCKS = "model.layers"


def copies(share=0.5, text=TEXT, how=HOW, count=2):
    return with_copies(build("llama"), BLOCKS, text, count, share, how).input_ids


def test_the_text_comes_first_and_unchanged():
    made = copies()
    assert made.shape == (24, 16)
    assert torch.equal(made[:8], TEXT.input_ids)
    assert not torch.equal(made[8:16], made[16:])


def test_about_the_share_is_replaced_and_never_the_first_token():
    made = copies(share=0.5, count=8).view(9, 8, 16)[1:]
    same = (made == TEXT.input_ids).float()
    assert bool(same[:, :, 0].all())
    # A draw may be the token that stood there.
    assert 0.45 < float(same[:, :, 1:].mean()) < 0.75


def test_what_is_written_is_what_the_model_predicts_there():
    """A model that is sure of each next token writes nothing else."""
    model = build("llama")
    model.lm_head.weight.data *= 1e4
    made = with_copies(model, BLOCKS, TEXT, 1, 1.0, HOW).input_ids[8:]
    with torch.no_grad():
        predicted = model(TEXT.input_ids).logits.argmax(-1)
    assert torch.equal(made[:, 1:], predicted[:, :-1])


def test_draws_depend_neither_on_batches_nor_on_the_process():
    whole = copies()
    assert torch.equal(copies(how=Estimation(batch_size=8, precision="float32")), whole)
    part = copies(text=TEXT.part(slice(4, 8)))
    assert torch.equal(part.view(3, 4, 16), whole.view(3, 8, 16)[:, 4:])


def test_layer_by_layer_a_store_holds_the_states_and_the_text_is_the_same():
    store = TensorStore(torch.device("cpu"), Budgets(host=0))
    seen = []
    made = with_copies(build("llama"), BLOCKS, TEXT, 2, 0.5, HOW, store, seen.append)
    assert torch.equal(made.input_ids, copies())
    assert sum(seen) == TEXT.input_ids.numel()
    assert store.bytes_on_disk == 0


def test_padding_stays():
    ids = TEXT.input_ids.clone()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 9:] = False
    made = with_copies(build("llama"), BLOCKS, CalibrationTokens(ids, mask, {}), 2, 1.0, HOW)
    assert torch.equal(made.attention_mask, mask.repeat(3, 1))
    assert torch.equal(made.input_ids[:, 9:], ids[:, 9:].repeat(3, 1))
    assert not torch.equal(made.input_ids[8:16, :9], ids[:, :9])
