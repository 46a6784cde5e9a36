"""Curvature of the loss: estimators of Kronecker factors."""

from llm_surgeon.curvature.factors import Curvature
from llm_surgeon.curvature.kfac import estimate

__all__ = ["Curvature", "estimate"]
