"""Every estimator of the table keeps the contract."""

import pytest

from extensions.estimator_contract import EstimatorContract
from llm_surgeon.curvature.estimators import ESTIMATORS
from llm_surgeon.recipe.methods import CURVATURES


class TestBuiltIn(EstimatorContract):
    # Scores of experts are no curvature of other structures: see test_routing.py.
    @pytest.fixture(params=[name for name in ESTIMATORS if not CURVATURES[name].structures])
    def estimator(self, request):
        return ESTIMATORS[request.param]
