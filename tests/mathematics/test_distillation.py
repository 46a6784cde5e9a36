"""The divergence of a student from its teacher, against sums over the whole vocabulary in float64."""

import pytest
import torch

from llm_surgeon.mathematics.distillation import divergence, likeliest

POSITIONS, VOCABULARY = 5, 40


def logits(seed, scale=3.0):
    return scale * torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def brute(student, teacher, temperature, tokens=None):
    """The sum over outcomes, with all tokens that are not listed as one outcome."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(POSITIONS):
        p, q = ((one[row].double() / temperature).softmax(-1) for one in (teacher, student))
        if tokens is not None:
            rest = [token for token in range(VOCABULARY) if token not in tokens[row].tolist()]
            p, q = (torch.cat([one[tokens[row]], one[rest].sum()[None]]) for one in (p, q))
        total = total + (p * (p / q).log()).sum()
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("count", [None, 1, 7, VOCABULARY, 1000])
def test_the_divergence_and_its_gradient_are_those_of_the_sum(count, temperature):
    student, teacher = logits(0).requires_grad_(), logits(1)
    told = likeliest(teacher, count, temperature)
    found = divergence(student, told, temperature)
    exact = student.detach().double().requires_grad_()
    expected = brute(exact, teacher, temperature, told.tokens)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found.backward()
    expected.backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_whole_divergence_is_the_difference_of_the_probabilities():
    student, teacher, temperature = logits(0).requires_grad_(), logits(1), 3.0
    divergence(student, likeliest(teacher, None, temperature), temperature).backward()
    difference = (student.detach() / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    torch.testing.assert_close(student.grad, temperature * difference)


def test_fewer_outcomes_tell_less_and_the_teacher_itself_is_at_no_distance():
    student, teacher = logits(0), logits(1)
    found = [float(divergence(student, likeliest(teacher, count))) for count in (1, 3, 10, 30, None)]
    assert found == sorted(found)
    for count in (1, 7, None):
        assert abs(float(divergence(teacher, likeliest(teacher, count)))) < 1e-5


def test_a_student_gains_nothing_by_what_the_teacher_holds_unlikely():
    """Without the rest as an outcome, probability on other tokens would not matter by itself."""
    teacher = logits(1)
    elsewhere = teacher.clone()
    elsewhere[:, teacher.argmin(-1)] += 20.0
    told = likeliest(teacher, 3)
    assert divergence(elsewhere, told) > divergence(teacher, told) + 1


def test_a_rest_without_weight_is_finite_and_so_are_its_gradients():
    teacher = torch.zeros(POSITIONS, VOCABULARY)
    teacher[:, 0] = 200.0
    student = logits(0).requires_grad_()
    found = divergence(student, likeliest(teacher, 2))
    found.backward()
    assert bool(found.isfinite())
    assert bool(student.grad.isfinite().all())


def test_some_positions_are_those_of_all():
    told = likeliest(logits(1), 4)
    part = told.at(slice(1, 3))
    assert torch.equal(part.logs, told.logs[1:3])
    assert torch.equal(part.tokens, told.tokens[1:3])
    assert torch.equal(part.rest, told.rest[1:3])
    whole = likeliest(logits(1), None).at(slice(0, 2))
    assert whole.tokens is None
    assert whole.rest is None
