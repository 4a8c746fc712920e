"""The pytest fixture `on_gpu`: code inside its block runs its Triton kernels as if on CUDA, with tensors of the CPU.

    def test_op(on_gpu):
        with on_gpu(schedule="random:1") as session:
            result = my_operator(x)
        assert len(session.launches) == 1

Tensors that are allocated without contents inside the block start poisoned. An operator asks Triton which device is
the current one: `triton.runtime.driver.active.get_active_torch_device()` is the CPU inside the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from unittest import mock

import pytest

from .session import Session

OnGpu = Callable[..., AbstractContextManager[Session]]


@contextmanager
def poisoning(session: Session) -> Iterator[None]:
    """torch.empty and its like give poisoned memory, whose reads before any write are found."""
    import torch

    def poisoned(allocate: Callable) -> Callable:
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "cpu":
                session.poison(tensor)
            return tensor

        return call

    with ExitStack() as patches:
        for place, name in [
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ]:
            patches.enter_context(mock.patch.object(place, name, poisoned(getattr(place, name))))
        yield


@contextmanager
def running_on_interpreter(
    schedule: str = "lockstep", arch: int = 80, resident: int | None = None
) -> Iterator[Session]:
    """Triton launches inside the block run here; `session.launches` tells what they did."""
    from .triton_driver import interpreting

    session = Session(schedule, resident)
    with interpreting(session, arch), poisoning(session):
        yield session


@pytest.fixture
def on_gpu() -> OnGpu:
    """`with on_gpu(schedule=..., arch=..., resident=...) as session:`; skips where there is no Triton."""
    pytest.importorskip("triton", reason="triton is not installed: it compiles the kernels")
    return running_on_interpreter
