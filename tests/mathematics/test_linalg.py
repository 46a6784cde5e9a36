import logging

import pytest
import torch

from llm_surgeon.errors import NonFiniteError, NotPositiveDefiniteError
from llm_surgeon.mathematics.linalg import (
    ESCALATION,
    MAX_ESCALATIONS,
    damped_cholesky,
    damping_of,
    inverse,
    inverse_diagonal,
    quadratic_forms,
    triangular_inverse,
)
from oracles import random_factor


def test_inverse_equals_the_dense_inverse():
    matrix = random_factor(9, torch.Generator().manual_seed(0))
    actual = inverse(torch.linalg.cholesky(matrix))
    torch.testing.assert_close(actual, torch.linalg.inv(matrix), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 9, 128, 129, 401])
def test_inverse_diagonal_equals_that_of_the_dense_inverse(size):
    matrix = random_factor(size, torch.Generator().manual_seed(0))
    lower = torch.linalg.cholesky(matrix)
    torch.testing.assert_close(triangular_inverse(lower) @ lower, torch.eye(size, dtype=lower.dtype))
    torch.testing.assert_close(inverse_diagonal(lower), torch.linalg.inv(matrix).diagonal(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 65, 201])
def test_quadratic_forms_are_those_of_the_whole_matrix(size):
    generator = torch.Generator().manual_seed(0)
    matrix = random_factor(size, generator) if size else torch.zeros(0, 0, dtype=torch.float64)
    vectors = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    whole = torch.einsum("cn,cd,dn->n", vectors, matrix, vectors)
    torch.testing.assert_close(quadratic_forms(vectors.T, matrix), whole, rtol=1e-12, atol=0)


def test_cholesky_is_of_the_damped_matrix_and_leaves_its_argument_alone():
    matrix = random_factor(6, torch.Generator().manual_seed(1))
    before = matrix.clone()
    factor = damped_cholesky(matrix, 0.25, "m")
    torch.testing.assert_close(factor @ factor.T, matrix + 0.25 * torch.eye(6), rtol=1e-12, atol=1e-12)
    assert torch.equal(matrix, before)


def test_damping_is_relative_to_the_mean_of_the_diagonal():
    assert damping_of(torch.diag(torch.tensor([1.0, 3.0])), 0.1) == pytest.approx(0.2)


def test_a_factor_of_zeros_has_a_damping_next_to_nothing():
    zeros = torch.zeros(3, 3)
    damping = damping_of(zeros, 0.01)
    assert 0 < damping < 1e-12
    inverse_of_nothing = inverse(damped_cholesky(zeros, damping, "zero"))
    torch.testing.assert_close(inverse_of_nothing * damping, torch.eye(3))
    assert bool((inverse_of_nothing.diagonal() ** 2).isfinite().all()), "costs divide by the product of two of them"


def test_float64_is_tried_before_more_damping(caplog):
    """A condition number that float32 cannot decompose and float64 can."""
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    with caplog.at_level(logging.WARNING):
        factor = damped_cholesky(matrix, 1e-9, "m")
    assert factor.dtype == torch.float32
    assert not caplog.records


def test_damping_is_escalated_with_a_warning_that_names_the_layer(caplog):
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.05]))
    with caplog.at_level(logging.WARNING):
        factor = damped_cholesky(indefinite, 0.01, "block 3 (inputs)")
    torch.testing.assert_close(factor @ factor.T, indefinite + 0.1 * torch.eye(3))
    assert "block 3 (inputs)" in caplog.text


def test_what_no_damping_mends_is_an_error_that_names_the_layer():
    hopeless = torch.diag(torch.tensor([1.0, -2 * 0.01 * ESCALATION**MAX_ESCALATIONS]))
    with pytest.raises(NotPositiveDefiniteError, match="block 3"):
        damped_cholesky(hopeless, 0.01, "block 3 (inputs)")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_factors_are_an_error_that_names_the_layer(bad):
    matrix = torch.eye(3)
    matrix[0, 1] = bad
    with pytest.raises(NonFiniteError, match="block 3"):
        damped_cholesky(matrix, 0.01, "block 3 (inputs)")
