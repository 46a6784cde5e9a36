import pytest
import torch

from llm_surgeon.errors import NonFiniteError
from llm_surgeon.mathematics.least_squares import LARGEST_SCALE, logit_scale, reconstructing_change

RIDGE = 0.3


def samples(tokens=9, rows=3, columns=5):
    """Errors and inputs of tokens, float64."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(tokens, rows, generator=generator, dtype=torch.float64)
    return error, torch.randn(tokens, columns, generator=generator, dtype=torch.float64)


def test_change_is_the_ridge_minimiser_of_a_dense_system():
    error, x = samples()
    rows, columns = error.shape[1], x.shape[1]
    damping = RIDGE * float((x**2).mean())
    # vec(D) row by row: each token asks for rows equations, and each weight for one that holds it at zero.
    design = torch.cat([torch.kron(torch.eye(rows, dtype=x.dtype), token[None]) for token in x])
    held = torch.eye(rows * columns, dtype=x.dtype) * (len(x) * damping) ** 0.5
    wanted = torch.cat([error.flatten(), torch.zeros(rows * columns, dtype=x.dtype)])
    expected = torch.linalg.lstsq(torch.cat([design, held]), wanted[:, None]).solution.view(rows, columns)

    change = reconstructing_change(error.T @ x / len(x), x.T @ x / len(x), RIDGE, "a")

    torch.testing.assert_close(change, expected, rtol=1e-10, atol=1e-12)


def test_weighting_the_error_by_rows_changes_nothing():
    """The minimiser for ``tr G (E - D X)(E - D X)^T`` with the ridge in the same metric is the plain one."""
    error, x = samples()
    root = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    weighted = error @ root

    plain = reconstructing_change(error.T @ x / len(x), x.T @ x / len(x), RIDGE, "a")
    change = reconstructing_change(weighted.T @ x / len(x), x.T @ x / len(x), RIDGE, "a")

    torch.testing.assert_close(torch.linalg.solve(root.T, change), plain)


def test_no_error_no_change():
    _, x = samples()

    change = reconstructing_change(torch.zeros(3, 5, dtype=x.dtype), x.T @ x, RIDGE, "a")

    assert not change.any()


def test_a_larger_ridge_changes_less():
    error, x = samples()

    sizes = [float(reconstructing_change(error.T @ x, x.T @ x, ridge, "a").norm()) for ridge in (0.01, 1.0, 100.0)]

    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2]


def test_inputs_that_are_not_finite_name_the_layer():
    with pytest.raises(NonFiniteError, match="the layer"):
        reconstructing_change(torch.zeros(1, 2), torch.full((2, 2), float("nan")), RIDGE, "the layer")


def test_the_scale_is_the_minimum_of_the_parabola_within_limits():
    # f(s) = 3 (s - 0.9)^2
    assert logit_scale(6 * (1 - 0.9), 6.0) == pytest.approx(0.9)
    assert logit_scale(-100.0, 1.0) == LARGEST_SCALE
    assert logit_scale(100.0, 1.0) == 1 / LARGEST_SCALE
    # Logits that are all alike: no scale changes them.
    assert logit_scale(0.0, 0.0) == 1.0
