"""Both loops of the table keep the contract."""

import pytest

from extensions.loop_contract import LoopContract

CASES = {
    "rows and columns": {"shots": 2},
    "steps": {"shots": 2, "steps_per_shot": 2},
    "a warm start": {"shots": 2, "curvature": "nearest-kronecker"},
    "single weights": {"shots": 2, "structure": "unstructured"},
    "reconstructed": {"shots": 2, "reconstruction": True, "reconstruction_copies": 0},
    "no data": {"shots": 3, "method": "magnitude"},
    "no data, block by block": {"method": "magnitude", "scope": "row"},
    "a score": {"method": "wanda"},
    "a survey": {"method": "wanda", "layer_budget": "owl", "owl_multiple": 2.0},
    "a solver": {"method": "sparsegpt"},
    "a refinement": {"method": "ria", "refine": "r2-dsnot"},
}


class TestBuiltIn(LoopContract):
    @pytest.fixture(params=list(CASES))
    def options(self, request):
        return CASES[request.param]
