"""Retrieval, attention, gate and blend in one launch: each part against its definition, whatever ran before."""

from __future__ import annotations

import pytest
import torch
from ops.gpu.test_latent_attention import Case

from unike_kernels import ops
from unike_kernels.ops import _triton
from unike_kernels.ops.cosine_topk import reference as search
from unike_kernels.ops.cosine_topk import triton as retrieval
from unike_kernels.ops.latent_attention import triton as latent
from unike_kernels.ops.memory_attention import triton as kernel


class Memory(Case):
    """A case whose ids are those that are found: every key of the index twice, the last token without a range."""

    def __init__(self, tokens, heads, c, d, r, k, dtype, *, n=70, bounded=True, **rest):
        super().__init__(tokens, heads, c, d, r, k, dtype, n=n, **rest)
        self.hidden, index = torch.randn(tokens, d).to(dtype), torch.randn(n, d)
        index[n // 2 :] = index[: n - n // 2]
        self.index = search.normalize_rows(index)
        self.ranges = torch.tensor([[0, n]] * tokens) if bounded else None
        if bounded:
            self.ranges[-1], self.ranges[0] = 3, torch.tensor([n // 2, n])
        self.k = k
        self.ids = search.cosine_topk(self.hidden, self.index, k, True, self.ranges)[1]

    def run(self, **given):
        queries, inputs, keys, values, _, *gate = self.operands()
        return kernel.memory_attention(
            self.hidden, self.index, self.k, self.ranges, queries, inputs, keys, values, *gate, None, self.projected,
            **given,
        )  # fmt: skip

    def check(self, out, alpha, ids):
        assert torch.equal(ids, self.ids)
        super().check(out, alpha)


@pytest.fixture(autouse=True)
def few_multiprocessors(with_multiprocessors):
    with_multiprocessors(6, retrieval, latent, kernel)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(dict(tokens=1, heads=1, c=70, d=70, r=20, k=21, dtype=torch.float32, bounded=False), id="float32"),
        pytest.param(
            dict(tokens=3, heads=2, c=24, d=40, r=12, k=5, dtype=torch.bfloat16), id="heads", marks=pytest.mark.slow
        ),
        pytest.param(dict(tokens=18, heads=1, c=24, d=24, r=12, k=5, n=40, dtype=torch.float16), id="tiles"),
        pytest.param(
            dict(tokens=4, heads=1, c=24, d=24, r=12, k=3, n=40, dtype=torch.float32, projected=False, anchor=2),
            id="w1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(tokens=2, heads=1, c=24, d=24, r=12, k=35, n=20, dtype=torch.float32, alpha=2, convention="eq7"),
            id="k>n",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_launch(shape, everywhere):
    case = Memory(**shape)
    case.check(*everywhere(case.run))


@pytest.mark.parametrize(
    ("tokens", "k", "launches"),
    [
        pytest.param(65, 3, 2, id="tokens"),
        pytest.param(9, 257, 1, marks=pytest.mark.slow, id="results"),  # the definition finds more than 256
        pytest.param(11, 3, 3, marks=pytest.mark.slow, id="estimates"),  # of which there is room for ten tokens'
    ],
)
def test_what_does_not_fit_into_one_launch_takes_several(tokens, k, launches, launched, monkeypatch):
    monkeypatch.setattr(retrieval, "multiprocessors", lambda: 16)
    if launches == 3:
        monkeypatch.setattr(retrieval, "MOST_ESTIMATES", 200)
    case = Memory(tokens, 1, 16, 16, 4, k, torch.float32, n=20)
    result, session = launched(case.run)
    case.check(*result)
    assert len(session.launches) == launches


def test_no_tokens_and_no_entries(launched):
    case = Memory(2, 1, 24, 24, 12, 4, torch.float32, bounded=False)
    case.index, case.keys, case.values, case.projected = case.index[:0], case.keys[:0], case.values[:0], None
    (out, alpha, ids), _ = launched(case.run)
    assert torch.equal(out, case.inputs)
    assert not alpha.any()
    assert (ids == -1).all()
    case = Memory(1, 1, 24, 24, 12, 4, torch.float32, bounded=False)
    case.hidden, case.queries, case.inputs = case.hidden[:0], case.queries[:0], case.inputs[:0]
    (out, alpha, ids), session = launched(case.run)
    assert (out.shape, alpha.shape, ids.shape) == ((0, 24), (0,), (0, 4))
    assert not session.launches


@pytest.mark.slow
def test_launches_of_a_layer_share_a_workspace(launched):
    """Each leaves the counters as the others can use them, however many meetings it had."""
    one, other = Memory(3, 1, 24, 24, 12, 4, torch.float32, n=20), Memory(2, 1, 16, 16, 4, 4, torch.float32, n=20)
    workspace = _triton.Workspace("cpu")

    def layers():
        found = []
        for case in (one, other):
            found.append(case.run(workspace=workspace))
            ids = retrieval.cosine_topk(case.hidden, case.index, 4, True, case.ranges, workspace=workspace)[1]
            found.append((*Case.run(case, workspace=workspace), ids))
        return found

    results, session = launched(layers)
    assert len(session.launches) == 6
    for case, pair in zip((one, other), zip(results[::2], results[1::2], strict=True), strict=True):
        for result in pair:
            case.check(*result)


def test_nothing_is_allocated_where_memory_is_given(allocates_nothing):
    allocates_nothing(kernel, Memory(3, 1, 24, 24, 12, 4, torch.float32).run)


def test_the_operator_chooses_it(on_gpu):
    case = Memory(3, 1, 24, 24, 12, 4, torch.float32)
    results = {}
    for backend in ("triton", "reference"):
        _triton._workspaces.clear()
        with ops.backend(backend), on_gpu() as session:
            results[backend] = ops.memory_attention(
                case.hidden, case.inputs, case.index, case.keys, case.values, case.encoder, k=4, queries=case.queries,
                scale=case.blend.scale, projected=case.projected, ranges=case.ranges,
            )  # fmt: skip
        assert len(session.launches) == (1 if backend == "triton" else 0)
    for got, wanted in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_keys_of_the_retrieval_are_read_once(launched):
    """By blocks that share them evenly, one a multiprocessor."""
    case = Memory(1, 1, 64, 64, 12, 4, torch.float32, n=1536, bounded=False)
    result, session = launched(case.run)
    case.check(*result)
    (launch,) = session.launches
    assert launch.grid == (6, 1, 1)
    assert launch.loads["index"].sectors <= 1.02 * case.index.numel() * 4 / 32
    total = sum(traffic.bytes for traffic in (*launch.loads.values(), *launch.stores.values()))
    assert launch.largest_block_bytes <= 1.3 * total / 6
