"""A clock that only the measured calls advance, cases whose systems take known times, and rows without measuring."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from unike_bench.harness.case import Case, Run, System
from unike_bench.harness.measure import Row
from unike_bench.harness.roofline import Bound
from unike_bench.harness.timing import Spread


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other take longer than these shapes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Clock:
    now: float = 0.0
    calls: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float):
        """A function that takes so long."""

        def run() -> str:
            self.now += seconds
            self.calls.append(name)
            return name

        return run


@pytest.fixture
def clock() -> Clock:
    return Clock()


@dataclass(frozen=True)
class KnownBound(Bound):
    """A bound that takes known times."""

    clock: Clock | None = None
    reading: float = 0.0
    multiplying: float = 0.0

    def probes(self):
        return {"read": self.clock.call("read", self.reading)}

    def seconds(self, probed):
        return probed["read"], self.multiplying


@pytest.fixture
def known_bound(clock):
    """(reading, multiplying, over) -> a bound that takes these seconds."""
    return lambda reading, multiplying=0.0, over=None: KnownBound((), {}, over, clock, reading, multiplying)


@pytest.fixture
def make_case(clock, known_bound):
    """System name -> (role, seconds, what its check does: None, a recall or an error); and the bound of the first."""

    def make(systems, *, read=0.0, multiplying=0.0, over=None, data=object, **shape) -> Case:
        def system(name, role, seconds, verdict) -> System:
            def check(output):
                assert output == name
                if isinstance(verdict, Exception):
                    raise verdict
                return verdict

            bound = known_bound(read, multiplying, over) if role == "ours" and read else None
            return System(role, lambda data: Run(clock.call(name, seconds), check, bound))

        made = {name: system(name, *told) for name, told in systems.items()}
        return Case("ffn", "an FFN", shape or {"d": 8}, data, made)

    return make


@pytest.fixture
def make_row():
    def make(system="ours", seconds=(1.0, 2.0, 3.0), role="ours", **more) -> Row:
        defaults = {"op": "ffn", "case": "ffn-d8", "title": "an FFN", "shape": {"d": 8}}
        return Row(**(defaults | {"system": system, "role": role, "seconds": tuple(seconds)} | more))

    return make


@pytest.fixture
def rows(make_row):
    """A retrieval with a peer that failed, a decode, and an FFN whose own check failed."""
    retrieval = {"op": "retrieval", "case": "retrieval-N9", "title": "a retrieval", "shape": {"N": 9}}
    decode = {"op": "decode", "case": "decode-T1", "title": "a decode", "shape": {"T": 1, "layers": 4}}
    return [
        make_row(
            "unike int8", (2e-3, 2e-3, 3e-3), speedup=Spread(2.0, 2.5, 3.0), against="faiss flat", read=5e-4,
            bound=1e-3, reached=0.5, **retrieval,
        ),
        make_row("faiss flat", (5e-3, 5e-3, 5e-3), "peer", speedup=Spread(2.0, 2.5, 3.0), against="unike int8",
                 recall=0.999, **retrieval),
        make_row("torch", (), "peer", failure="AssertionError: other | ids", **retrieval),
        make_row("unike patched", (0.02, 0.02, 0.02), over=Spread(0.99, 1.25, 1.3), added=4e-3, bound=2e-3,
                 reached=0.5, **decode),
        make_row("unike ffn", (), failure="AssertionError: off by one"),
    ]  # fmt: skip
