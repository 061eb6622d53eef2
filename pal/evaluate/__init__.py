"""Scores of a model on benchmarks and manifests, with intervals and the no-audio baseline."""

from pal.evaluate.benchmark import Benchmark, from_records, open_task
from pal.evaluate.engine import evaluate
from pal.evaluate.folder import load_result
from pal.evaluate.result import ItemResult, MetricValue, Result

__all__ = ["Benchmark", "ItemResult", "MetricValue", "Result", "evaluate", "from_records", "load_result", "open_task"]
