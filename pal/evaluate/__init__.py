"""Evaluation on benchmarks and manifests, with confidence intervals and the baseline without audio."""

from pal.evaluate.benchmark import Benchmark, from_records, open_task
from pal.evaluate.engine import evaluate
from pal.evaluate.folder import load_result
from pal.evaluate.result import ItemResult, MetricValue, Result

__all__ = ["Benchmark", "ItemResult", "MetricValue", "Result", "evaluate", "from_records", "load_result", "open_task"]
