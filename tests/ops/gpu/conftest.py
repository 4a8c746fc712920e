"""The GPU kernels on the interpreter of tools/ptxsim: every test here runs what Triton compiles, without a GPU.

Those that compare with the definition run on a real one too: `pytest -m gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it compiles the kernels")

from ptxsim import Session

from unike_kernels.ops import _backend, _triton

# How often a kernel runs on the interpreter, where warps in step cost a quarter of warps one by one. Orders must agree.
ORDERS = {
    "in step": ("lockstep",),
    "one by one": ("lockstep", "random:0"),
    "in any order": ("lockstep", "reversed", *(f"random:{seed}" for seed in range(1, 5))),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By default the first case of each test runs one by one, and the others in step; in the slow tests all of both."""
    begun = set()
    for item in items:
        order = item.callspec.params.get("everywhere") if hasattr(item, "callspec") else None
        if order in ("in step", "one by one"):
            if ((item.function, order) in begun) == (order == "one by one"):
                item.add_marker(pytest.mark.slow)
            begun.add((item.function, order))


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
def with_multiprocessors(request, monkeypatch) -> Callable[..., None]:
    """(how many, *modules) -> nothing: so few for their launches, as the interpreter's tensors are small; a GPU has its
    own number."""

    def set_them(count: int, *modules: Any) -> None:
        if request.node.get_closest_marker("gpu") is None:
            for module in modules:
                monkeypatch.setattr(module, "multiprocessors", lambda: count)

    return set_them


@pytest.fixture
def device() -> Iterator[None]:
    """All tensors that a test makes are on the GPU."""
    if reason := _backend.triton_missing():
        pytest.fail(reason)  # it was asked for
    _triton._workspaces.clear()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
    _triton._workspaces.clear()


@pytest.fixture(
    params=[
        "in step",
        "one by one",
        pytest.param("in any order", marks=pytest.mark.slow),
        pytest.param("device", marks=pytest.mark.gpu),
    ]
)
def everywhere(request) -> Callable[[Callable[[], Any]], Any]:
    """call -> its result, the same bit for bit whatever order blocks and warps run in: one launch of the interpreter
    for each of some orders, or with `-m gpu` several of a GPU, in the orders that it takes."""
    if request.param == "device":
        request.getfixturevalue("device")
        return lambda call: agreeing(call() for _ in range(20))
    launched = request.getfixturevalue("launched")

    def once(call: Callable[[], Any], schedule: str) -> Any:
        result, session = launched(call, schedule)
        assert len(session.launches) == 1
        return result

    return lambda call: agreeing(once(call, schedule) for schedule in ORDERS[request.param])


def agreeing(results: Iterable[Any]) -> Any:
    """The first of them, of which the others have all bits."""
    first, *others = results
    for result in others:
        for got, wanted in zip(bits(result), bits(first), strict=True):
            assert torch.equal(got, wanted)
    return first


@pytest.fixture
def allocates_nothing(launched, monkeypatch) -> Callable[[Any, Callable[..., Any]], None]:
    """(module, call) -> nothing: the second of two calls with `out` and a workspace allocates nothing, and is right."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an allocation")

    def check(module: Any, call: Callable[..., Any]) -> None:
        wanted, _ = launched(call)
        out = torch.empty_like(wanted) if isinstance(wanted, torch.Tensor) else tuple(map(torch.empty_like, wanted))
        workspace = _triton.Workspace("cpu")
        launched(lambda: call(out=out, workspace=workspace))
        for t in [out] if isinstance(out, torch.Tensor) else out:
            t.zero_()

        def again() -> Any:
            with monkeypatch.context() as patch:
                for place, name in [
                    (torch, "empty"),
                    (torch, "empty_like"),
                    (torch, "zeros"),
                    (_triton, "workspace_of"),
                    (module, "workspace_of"),
                ]:
                    patch.setattr(place, name, refuse, raising=place is not module)
                return call(out=out, workspace=workspace)

        assert launched(again)[0] is out
        for got, expected in zip(bits(out), bits(wanted), strict=True):
            assert torch.equal(got, expected)
        assert not workspace.counters.bitwise_and(2**31 - 1).any()  # ready for the next launch

    return check
