"""The choice of a backend: by preference, by force, and never in silence another one than was asked for."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from unike_kernels import BackendUnavailableError, _native, ops
from unike_kernels.ops import _backend

X = torch.eye(3)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("UNIKE_BACKEND", raising=False)


@pytest.fixture
def native_calls(monkeypatch):
    """The names of the native core's functions that were called."""
    calls, core = [], _native.core()

    class Recorder:
        def __getattr__(self, name):
            if name in ("cosine_topk", "normalize_rows", "memory_attention"):
                calls.append(name)
            return getattr(core, name)

    monkeypatch.setattr(_native, "_C", Recorder())
    return calls


@pytest.fixture
def table(monkeypatch):
    """An empty table of operators, filled by `_backend.register`."""
    fresh = {}
    monkeypatch.setattr(_backend, "_table", fresh)
    return fresh


class Operands(NamedTuple):
    like: torch.Tensor


def run_of(op="op"):
    return _backend.dispatch(op, Operands(X)).run


def test_the_native_backend_is_the_default_on_the_cpu(native_calls):
    ops.cosine_topk(X, X, 2)
    assert native_calls == ["normalize_rows", "cosine_topk"]  # the keys; queries are normalised inside
    native_calls.clear()
    encoder = ops.SemanticEncoder(X, X[0], X, X[0])
    ops.memory_attention(X, X, X, X, X, encoder, k=1)
    ops.normalize_rows(X)
    assert native_calls == ["memory_attention", "normalize_rows"]


def test_float64_goes_to_the_reference_unasked(native_calls):
    ops.cosine_topk(X.double(), X.double(), 2)
    ops.normalize_rows(X.double())
    assert native_calls == []


def test_the_reference_can_be_forced(native_calls, monkeypatch):
    encoder = ops.SemanticEncoder(X, X[0], X, X[0])

    def everything():
        ops.cosine_topk(X, X, 2)
        ops.memory_attention(X, X, ops.normalize_rows(X), X, X, encoder, k=1)

    with ops.backend("reference"):
        everything()
    monkeypatch.setenv("UNIKE_BACKEND", "reference")
    everything()
    assert native_calls == []
    monkeypatch.delenv("UNIKE_BACKEND")
    everything()
    assert native_calls


def test_blocks_nest_and_restore_even_after_an_error(monkeypatch):
    monkeypatch.setenv("UNIKE_BACKEND", "cuda")
    assert _backend.forced_backend() == "cuda"
    with ops.backend("reference"):
        with ops.backend("native"):
            assert _backend.forced_backend() == "native"
        assert _backend.forced_backend() == "reference"
        with pytest.raises(ValueError, match="k: expected"), ops.backend("native"):
            ops.cosine_topk(X, X, 0)
        assert _backend.forced_backend() == "reference"
    assert _backend.forced_backend() == "cuda"
    monkeypatch.setenv("UNIKE_BACKEND", "")
    assert _backend.forced_backend() is None


@pytest.mark.parametrize("name", ["numpy", "Native", ""])
def test_an_unknown_name_is_an_error(name, monkeypatch):
    with pytest.raises(ValueError, match=r"backend\(name\): expected one of cuda, native, reference, triton; got "):
        ops.backend(name).__enter__()
    if name:
        monkeypatch.setenv("UNIKE_BACKEND", name)
        with pytest.raises(ValueError, match=f"UNIKE_BACKEND: expected one of .*; got '{name}'"):
            ops.cosine_topk(X, X, 1)


def test_a_forced_backend_that_the_operator_lacks_is_an_error(monkeypatch):
    pool = ops.EditPool(X, X[0], None, None, X, X[:1], X[0, :1], *(torch.tensor(t) for t in ([0, 3], [0, 1], [0])))
    with ops.backend("native"), pytest.raises(BackendUnavailableError, match="patched_ffn has no 'native'"):
        ops.patched_ffn(X, ops.FFNWeights(X, None, None, None, X, None), pool, activation="relu")
    monkeypatch.setenv("UNIKE_BACKEND", "cuda")
    with pytest.raises(BackendUnavailableError, match=r"add_extra_neurons has no 'cuda' backend; it has: .*native"):
        ops.patched_ffn(X, X, pool, activation="relu")


def test_a_forced_backend_that_refuses_the_tensors_is_an_error():
    with ops.backend("native"), pytest.raises(BackendUnavailableError, match=r"'native' cannot .* float64"):
        ops.cosine_topk(X.double(), X.double(), 1)


def test_without_the_extension_native_is_missing(monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_REASON", "not built")
    assert ops.available("cosine_topk")["native"] == "not built"
    assert ops.available("cosine_topk")["reference"] is None
    assert ops.cosine_topk(X, X, 1)[1].flatten().tolist() == [0, 1, 2]
    assert torch.equal(ops.normalize_rows(X), X)
    with ops.backend("native"), pytest.raises(BackendUnavailableError, match="'native' cannot run here: not built"):
        ops.cosine_topk(X, X, 1)


def test_the_first_backend_that_can_run_is_chosen(table):
    state = {"native": "too old", "cuda": "gone", "triton": None}
    for name in reversed(_backend.BACKENDS):
        _backend.register("op", name, name.upper, missing=lambda name=name: state.get(name))
    assert run_of()() == "TRITON"
    state["native"] = None
    assert run_of()() == "NATIVE"
    state.update(dict.fromkeys(_backend.BACKENDS[:3], "gone"))
    assert run_of()() == "REFERENCE"
    assert _backend.available("op") == dict.fromkeys(_backend.BACKENDS[:3], "gone") | {"reference": None}
    with ops.backend("native"), pytest.raises(BackendUnavailableError, match="gone"):
        run_of()


def test_a_composition_comes_before_the_definition_and_cannot_be_forced(table):
    _backend.register("op", "reference", lambda like: "REFERENCE")
    _backend.register("op", _backend.COMPOSED, lambda like: "COMPOSED")
    assert _backend.call("op", Operands(X)) == "COMPOSED"
    with ops.backend("reference"):
        assert _backend.call("op", Operands(X)) == "REFERENCE"
    assert _backend.available("op") == {"reference": None}
    with pytest.raises(ValueError, match="expected one of"), ops.backend("composed"):
        pass


def test_where_nothing_runs_is_an_error(table):
    _backend.register("op", "native", min, refuse=lambda operands: f"not on {operands.like.device}")
    with pytest.raises(BackendUnavailableError, match="op: no backend runs on device cpu"):
        run_of()


def test_every_operator_has_its_definition():
    assert _backend._table
    assert all(ops.available(op)["reference"] is None for op in _backend._table)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("cuda", "hip", "error", "told"),
    [
        (None, None, None, "is built for CPUs alone; install a build of it for CUDA or ROCm"),
        ("13.0", None, "The NVIDIA driver on your system is too old (found version 12040).", "found version 12040"),
        (None, "7.0", "No HIP GPUs are available", "finds none: No HIP GPUs are available"),
        ("13.0", None, None, "finds none"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, cuda, hip, error, told):
    def init():
        if error:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "init", init)
    reason = _backend.gpu_missing()
    assert reason.startswith(f"there is no GPU: torch {torch.__version__} ") and told in reason
