"""The loss of a recovery, against the logits that the models themselves make."""

import pytest
import torch

from llm_surgeon.mathematics.distillation import divergence, likeliest
from llm_surgeon.recovery import objective
from llm_surgeon.recovery.objective import Objective, Student, Teacher
from llm_surgeon.recovery.zeros import Zeros
from tiny import VOCABULARY, build

# Plain, learned positions, a cap on the logits, a factor on them, and a head of its own.
FAMILIES = ["llama", "opt", "gemma2", "granite", "cohere2", "gpt2", "gpt-neox"]


def tokens(seed=0):
    return torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(seed))


def perturbed(family):
    """A model a little off the one that ``build`` makes."""
    model = build(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def logits_of(model, ids):
    return model(ids).logits[:, :-1].flatten(0, 1).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradients_are_those_of_the_models_own_logits(family, monkeypatch):
    # A few positions at a time.
    monkeypatch.setattr(objective, "_LOGITS", 5 * VOCABULARY)
    how, ids = Objective(temperature=1.5, top_k=6, label_weight=0.25), tokens()
    teacher, model, plain = build(family).eval(), perturbed(family).eval(), perturbed(family).eval()
    with torch.no_grad():
        told = likeliest(logits_of(teacher, ids), 6, 1.5)
    found = Student(model, how)(ids, Teacher(teacher, how)(ids))
    logits = logits_of(plain, ids)
    labels = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    expected = 0.25 * labels + 0.75 * divergence(logits, told, 1.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.backward()
    expected.backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_without_a_teacher_the_loss_is_that_of_the_text():
    ids, model = tokens(), build("llama").eval()
    found = Student(model, Objective())(ids)
    assert float(found.detach()) == pytest.approx(
        float(model(ids, labels=ids).loss.detach()) * ids[:, 1:].numel(), rel=1e-5
    )


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    ids, model = tokens(), build("llama")
    how = Objective(top_k=5)
    loss = Student(model, how)(ids, Teacher(build("llama"), how)(ids))
    loss.backward()
    assert abs(float(loss.detach())) < 1e-3
    assert max(float(parameter.grad.abs().max()) for parameter in model.parameters()) < 1e-4


def test_a_teacher_does_not_change():
    teacher = Teacher(build("llama"), Objective())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(tokens()).logs.requires_grad


def test_zeros_of_matrices_have_no_gradient():
    weight, norm = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [2.0, 3.0]])), torch.nn.Parameter(torch.zeros(2))
    whole = torch.nn.Parameter(torch.ones(2, 2))
    parameters = {"weight": weight, "norm": norm, "whole": whole, "unused": torch.nn.Parameter(torch.zeros(1, 1))}
    zeros = Zeros(parameters)
    for parameter in (weight, norm, whole):
        parameter.grad = torch.ones_like(parameter)
    zeros.clear_gradients(parameters)
    assert weight.grad.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert norm.grad.tolist() == [1.0, 1.0]
    assert whole.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]
