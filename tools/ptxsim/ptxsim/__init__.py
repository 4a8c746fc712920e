"""Compiled GPU code on a CPU: PTX of Triton and nvcc, executed by numpy, with checks that hardware does not make.

README.md says what is executed, what is checked, and what is not modelled.
"""

from .counters import Launch, SharedTraffic, Traffic
from .errors import (
    AsyncCopyError,
    DeadlockError,
    DivergentBarrierError,
    MisalignedError,
    MissingLanesError,
    OutOfBoundsError,
    RaceError,
    SimulationError,
    UninitialisedReadError,
    UnsupportedInstructionError,
)
from .session import LoadedKernel, LoadedModule, Session, load

__all__ = [
    "AsyncCopyError",
    "DeadlockError",
    "DivergentBarrierError",
    "Launch",
    "LoadedKernel",
    "LoadedModule",
    "MisalignedError",
    "MissingLanesError",
    "OutOfBoundsError",
    "RaceError",
    "Session",
    "SharedTraffic",
    "SimulationError",
    "Traffic",
    "UninitialisedReadError",
    "UnsupportedInstructionError",
    "load",
]
