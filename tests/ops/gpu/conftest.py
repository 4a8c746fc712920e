"""The GPU kernels on the interpreter of tests/ptxsim: every test here runs what Triton compiles, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it compiles the kernels")

from ptxsim import Session

from unike_kernels.ops import _triton

SCHEDULES = ("lockstep", "reversed", *(f"random:{seed}" for seed in range(5)))


def bits(result: Any) -> list[torch.Tensor]:
    """The tensors of a result as integers, so that NaNs and signs of zeros are compared too."""
    tensors = [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]
    return [t.contiguous().view(torch.uint8) for t in tensors]


@pytest.fixture
def launched(on_gpu) -> Callable[..., tuple[Any, Session]]:
    """(call, schedule, arch) -> its result, and the session that it ran in, with scratch that nobody has written."""

    def run(call: Callable[[], Any], schedule: str = "lockstep", arch: int = 80) -> tuple[Any, Session]:
        _triton._workspaces.clear()
        with on_gpu(schedule=schedule, arch=arch) as session:
            return call(), session

    return run


@pytest.fixture
def everywhere(launched) -> Callable[[Callable[[], Any]], Any]:
    """call -> its result, from one launch, the same bit for bit whatever order blocks and warps run in."""

    def run(call: Callable[[], Any]) -> Any:
        first = None
        for schedule in SCHEDULES:
            result, session = launched(call, schedule)
            assert len(session.launches) == 1
            if first is None:
                first = result
            for got, wanted in zip(bits(result), bits(first), strict=True):
                assert torch.equal(got, wanted), schedule
        return first

    return run
