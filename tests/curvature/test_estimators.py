"""Every estimator of the table keeps the contract."""

import pytest

from extensions.estimator_contract import EstimatorContract
from llm_surgeon.curvature.estimators import ESTIMATORS


class TestBuiltIn(EstimatorContract):
    @pytest.fixture(params=list(ESTIMATORS))
    def estimator(self, request):
        return ESTIMATORS[request.param]
