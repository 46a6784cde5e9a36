"""Options of former versions, each with the fixed behaviour that replaced it."""

from __future__ import annotations

REMOVED = {
    "kronecker_iterations": "nearest-kronecker and kronecker-sum always begin with 2 power iterations",
    "refine_cycles": "a row has always at most 50 swaps",
    "refine_threshold": "a row is always left alone at an expected error of 0.1",
    "lora_share": "corrections always use all calibration sequences",
    "eval_stride": "the windows of a run never overlap; `llm-surgeon eval` has --stride",
}
