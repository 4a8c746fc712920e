"""Measuring what an edit does (metrics) and what it costs (latency)."""

from __future__ import annotations

from .answers import answers
from .evaluate import Evaluation, evaluate
from .files import Form, read_requests
from .latency import LatencyRow, LatencyTable, measure_latency
from .metrics import METRICS, PROTOCOLS, Case, Observation, observe, observe_case, score

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Case",
    "Evaluation",
    "Form",
    "LatencyRow",
    "LatencyTable",
    "Observation",
    "answers",
    "evaluate",
    "measure_latency",
    "observe",
    "observe_case",
    "read_requests",
    "score",
]
