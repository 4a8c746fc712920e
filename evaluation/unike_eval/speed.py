"""How long editing takes: extraction, encoders, one edit, and several together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unike_kernels.training import EditResult, build_memory, extract, train_edits

from .experiments import Backbone, load, suite
from .settings import DEFAULTS

_TOGETHER = 8


@dataclass(frozen=True)
class Speed:
    """Of a backbone, with UniKE's settings.

    Attributes:
        triplets: extracted for the memory, and per second.
        encoders: seconds for the encoders of all layers, W_zeta and the tables.
        alone: seconds of each edit that was trained by itself.
        together: seconds an edit, eight trained together.
        steps: of the edits, in the mean.
        reached: edits that reached their target.
    """

    backbone: Backbone
    triplets: tuple[int, float]
    encoders: float
    alone: Sequence[float]
    together: float
    steps: float
    reached: int

    def markdown(self) -> str:
        """A line of the table."""
        count, rate = self.triplets
        low, middle, high = statistics.quantiles(self.alone, n=4) if len(self.alone) > 1 else [self.alone[0]] * 3
        return (
            f"| {self.backbone} | {rate:.0f} of {count} | {self.encoders:.0f} s | {middle:.2f} s ({low:.2f} to "
            f"{high:.2f}) | {self.together:.2f} s | {self.steps:.0f} | {self.reached} of {len(self.alone)} |"
        )


HEADER = (
    "| backbone | triplets a second | encoders | an edit, median, quartiles | an edit, 8 together | steps | reached |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def editing_speed(backbone: Backbone, edits: int = 24) -> Speed:
    """Measure it on the validation requests of its suite of questions. Raises ValueError for less than one edit."""
    if edits < 1:
        raise ValueError(f"edits: expected at least 1, got {edits}")
    model, processor = load(backbone)
    tested, settings = suite(backbone, model, processor, "vqa"), DEFAULTS["UniKE"]
    triplets = [request.triplet for request in tested.train]
    start = time.perf_counter()
    extract(model, processor, triplets, progress=False)
    extracting = time.perf_counter() - start
    start = time.perf_counter()
    config, encoders = settings["config"], settings["encoders"]
    training = replace(settings["training"], end=tested.ended)
    memory = build_memory(model, processor, triplets, config=config, training=encoders, progress=False).memory
    building = time.perf_counter() - start
    requests = [request.case.request for request in tested.validation[:edits]]

    def train(batch_size: int, wanted: Sequence[int]) -> tuple[float, list[EditResult]]:
        began = time.perf_counter()
        results = train_edits(
            model, processor, [requests[i] for i in wanted], memory, preserve=tested.preserve,
            training=training, batch_size=batch_size, progress=False,
        )  # fmt: skip
        return time.perf_counter() - began, results

    train(1, [0])  # the first pass sets up threads and allocators
    alone = [train(1, [i]) for i in range(len(requests))]
    seconds, together = train(_TOGETHER, range(len(requests)))
    steps = statistics.fmean(result.steps for result in together)
    return Speed(
        backbone, (len(triplets), len(triplets) / extracting), building - extracting, [took for took, _ in alone],
        seconds / len(requests), steps, sum(result.reached for result in together),
    )  # fmt: skip
