"""Every operator under whatever torch differentiates and maps with: as its definition in float64 under the same.

Kernels have one derivative, the first in reverse mode. All others are composed of torch's operators, and maps take one
example after the other; none may be dropped, or come to a kernel as an address.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad, functional
from torch.fx.experimental.proxy_tensor import make_fx

from unike_kernels import ops
from unike_kernels.ops.cosine_topk import reference as search
from unike_kernels.ops.latent_attention import blend_of
from unike_kernels.ops.latent_attention import reference as latent
from unike_kernels.ops.memory_attention import PreparedMemory
from unike_kernels.ops.patched_ffn import PreparedNeurons
from unike_kernels.ops.patched_ffn import reference as ffn
from unike_kernels.retrieval import CosineIndex

M, D, R, N, K = 3, 4, 2, 6, 3  # tokens, width, of Enc_sem, entries, of which retrieved
POOL = {"keys": (5, D), "key_bias": (5,), "up": (5, D), "up_bias": (5,), "values": (5, D), "zeta": (2, D), "beta": (2,)}
BASE = {"w_in": (3, D), "b_in": (3,), "w_up": (3, D), "b_up": (3,), "w_out": (D, 3), "b_out": (D,)}
TOKENS = {"x": (M, D), "base": (M, D)}
SHIFT = {"queries": (M, D), "inputs": (M, D)}

LISTS = torch.tensor([0, 2, 4]), torch.tensor([0, 1, 3, 3]), torch.tensor([1, 0, 1])  # neurons of edits, rows, edits
IDS = torch.tensor([[0, 2, 5], [1, -1, 3], [-1, -1, -1]])

Leaves = dict[str, Tensor]


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> Leaves:
    """Around one half, so that gates are neither closed nor open to the end."""
    made = torch.Generator().manual_seed(seed)
    return {name: (0.5 + torch.randn(s, dtype=torch.float64, generator=made)).to(dtype) for name, s in shapes.items()}


def pool_of(t: Leaves) -> ops.EditPool:
    """The second token uses both edits, the third none; the last neuron is of neither."""
    return ops.EditPool(*(t[name] for name in POOL), *LISTS)


def memory(dtype: torch.dtype) -> tuple[Any, ...]:
    """hidden, index, keys, values, those by w1, and Enc_sem."""
    shapes = {"hidden": (M, D), "index": (N, D), "keys": (N, 1, D), "values": (N, 1, D)}
    t = draw(shapes | {"w1": (R, D), "b1": (R,), "w2": (D, R), "b2": (D,)}, dtype, 3)
    t["index"] = search.normalize_rows(t["index"])
    encoder = ops.SemanticEncoder(*(t[name] for name in ("w1", "b1", "w2", "b2")))
    return *(t[name] for name in shapes), ops.project_values(t["values"], encoder), encoder


# Of the operators, and of the definition; made before there is any transformation.
NEURONS = {library: pool_of(draw(POOL, torch.float32 if library else torch.float64, 4)) for library in (True, False)}
MEMORY = {library: memory(torch.float32 if library else torch.float64) for library in (True, False)}


def neurons(library: bool, x: Tensor, base: Tensor, **pool: Tensor) -> Tensor:
    if library:
        return ops.patched_ffn(x, base, pool_of(pool), activation="gelu")
    return ffn.add_extra_neurons(x, base, pool_of(pool), "gelu")


def fused(library: bool, x: Tensor, **t: Tensor) -> Tensor:
    base = ops.FFNWeights(*(t[name] for name in BASE))
    if library:
        return ops.patched_ffn(x, base, pool_of(t), activation="gelu_tanh")
    return ffn.add_extra_neurons(x, ffn.base_ffn(x, base, "gelu_tanh"), pool_of(t), "gelu_tanh")


def prepared_neurons(library: bool, x: Tensor, base: Tensor) -> Tensor:
    if library:  # laid out where it is first needed
        return PreparedNeurons(NEURONS[True], "gelu")(x, base)
    return ffn.add_extra_neurons(x, base, NEURONS[False], "gelu")


def shift(library: bool, queries: Tensor, inputs: Tensor, **given: Tensor) -> Tensor:
    """Output and gate of the memory attention."""
    hidden, index, keys, values, _, encoder = MEMORY[library]
    if library:
        out, alpha, _ = ops.memory_attention(
            hidden, inputs, index, keys, values, encoder, k=K, queries=queries.unsqueeze(1), scale=0.7, **given
        )
        return torch.cat([out, alpha.unsqueeze(1)], 1)
    return attend(False, queries, inputs, search.cosine_topk(hidden, index, K, True)[1], **given)


def attend(library: bool, queries: Tensor, inputs: Tensor, ids: Tensor | None = None, **given: Tensor) -> Tensor:
    """Output and gate of the latent attention; the last token retrieved nothing, where no ids are given."""
    _, _, keys, values, _, encoder = MEMORY[library]
    ids = IDS if ids is None else ids
    if library:
        out, alpha = ops.latent_attention(queries, inputs, keys[:, 0], values[:, 0], ids, encoder, scale=0.7, **given)
    else:
        gate = given.get("alpha"), given.get("anchor")
        switches = latent.Blend(0.7, "inclusion", "match")
        q = queries.unsqueeze(1)
        out, alpha = latent.latent_attention(q, inputs, keys, values, ids, encoder, *gate, switches)
    return torch.cat([out, alpha.unsqueeze(1)], 1)


def prepared_memory(library: bool, queries: Tensor, inputs: Tensor) -> Tensor:
    if not library:
        return shift(False, queries, inputs)[:, :-1]
    hidden, *tables = MEMORY[True]
    tables.insert(1, None)
    queries = queries.unsqueeze(1)
    switches = blend_of(queries, 0.7, "inclusion", "match")
    return PreparedMemory(*tables)(hidden, queries, inputs, K, None, None, None, switches)


def scores(library: bool, queries: Tensor, keys: Tensor) -> Tensor:
    return (ops if library else search).cosine_topk(queries, keys, K)[0]


def scores_of_units(library: bool, queries: Tensor, x: Tensor) -> Tensor:
    name = ops if library else search
    return name.cosine_topk(queries, name.normalize_rows(x), K, normalized=True)[0]


CASES: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "neurons": (neurons, TOKENS | POOL),
    "fused": (fused, {"x": (M, D)} | BASE | POOL),
    "prepared_neurons": (prepared_neurons, TOKENS),
    "attend": (attend, SHIFT),
    "attend_anchored": (attend, SHIFT | {"anchor": (1, D)}),
    "attend_given": (attend, SHIFT | {"alpha": (M,)}),
    "shift": (shift, SHIFT),
    "shift_anchored": (shift, SHIFT | {"anchor": (M, D)}),
    "prepared_memory": (prepared_memory, SHIFT),
    "scores": (scores, {"queries": (M, D), "keys": (N, D)}),
    "scores_of_units": (scores_of_units, {"queries": (M, D), "x": (N, D)}),
}

F = Callable[..., Tensor]


def loss(f: F) -> F:
    return lambda *leaves: f(*leaves).square().sum()


def every(f: F) -> tuple[int, ...]:
    return tuple(range(len(f)))


def asking(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in leaves]


def forward_mode(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, leaves, along)))


def forward_mode_without_gradients(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    with torch.no_grad():
        return forward_mode(f, leaves, along)


def forward_over_reverse(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    with forward_ad.dual_level():
        ready = [forward_ad.make_dual(t, v) for t, v in zip(asking(leaves), along, strict=True)]
        return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(loss(f)(*ready), ready)]


def second_order(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    ready = asking(leaves)
    first = torch.autograd.grad(loss(f)(*ready), ready, create_graph=True)
    return first, torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, along, strict=True)), ready)


def third_order(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    ready = asking(leaves)
    slope = loss(f)(*ready)
    for _ in range(3):
        grads = torch.autograd.grad(slope, ready, create_graph=True)
        slope = sum((g * v).sum() for g, v in zip(grads, along, strict=True))
    return slope


def vectorized(strategy: str, f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    return functional.jacobian(f, tuple(leaves), vectorize=True, strategy=strategy)


def batched_gradients(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    ready = asking(leaves)
    out = f(*ready)
    several = torch.eye(out.numel(), dtype=out.dtype)[::5].reshape(-1, *out.shape)
    return torch.autograd.grad(out, ready, several, is_grads_batched=True)


def hessian(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    return functional.hessian(loss(f), tuple(leaves), vectorize=True)


def twice(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    """Saved tensors packed and unpacked, with the graph kept, and to one leaf alone."""
    ready = asking(leaves)
    with torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly(check_nan=True):
        value = loss(f)(*ready)
        return [torch.autograd.grad(value, ready, retain_graph=True) for _ in range(2)] + [
            torch.autograd.grad(value, t, retain_graph=True) for t in ready
        ]


def examples(leaves: list[Tensor], along: list[Tensor]) -> list[Tensor]:
    """Two of each leaf, the dimension that counts them at the end."""
    return [torch.stack([t, t + v], -1) for t, v in zip(leaves, along, strict=True)]


def mapped(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    return func.vmap(f, -1)(*examples(leaves, along))


def mapped_without_gradients(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    with torch.no_grad():
        return mapped(f, leaves, along)


def mapped_in_part(f: F, leaves: list[Tensor], along: list[Tensor]) -> Any:
    """One leaf has examples, twice nested; the others are shared. With the usual gradients to all."""
    ready = asking([torch.stack([t, v]) if i == 0 else t for i, (t, v) in enumerate(zip(leaves, along, strict=True))])
    once = func.vmap(f, (0, *[None] * (len(leaves) - 1)))
    out = once(*ready), func.vmap(once, (0, *[None] * (len(leaves) - 1)))(ready[0].unsqueeze(0), *ready[1:])
    return out, torch.autograd.grad(sum(t.square().sum() for t in out), ready)


MODES: dict[str, Callable[[F, list[Tensor], list[Tensor]], Any]] = {
    "forward mode": forward_mode,
    "forward mode without gradients": forward_mode_without_gradients,
    "forward over reverse": forward_over_reverse,
    "second order": second_order,
    "third order": third_order,
    "hvp": lambda f, leaves, along: functional.hvp(loss(f), tuple(leaves), tuple(along)),
    "hessian": hessian,
    "jacobian, vectorized": functools.partial(vectorized, "reverse-mode"),
    "jacobian, vectorized in forward mode": functools.partial(vectorized, "forward-mode"),
    "batched gradients": batched_gradients,
    "twice": twice,
    "func.jvp": lambda f, leaves, along: func.jvp(f, tuple(leaves), tuple(along)),
    "func.vjp": lambda f, leaves, along: (lambda out, pull: (out, pull(out)))(*func.vjp(f, *leaves)),
    "func.grad": lambda f, leaves, along: func.grad(loss(f), tuple(range(len(leaves))))(*leaves),
    "func.jacrev": lambda f, leaves, along: func.jacrev(f, tuple(range(len(leaves))))(*leaves),
    "func.jacfwd": lambda f, leaves, along: func.jacfwd(f, tuple(range(len(leaves))))(*leaves),
    "func.hessian": lambda f, leaves, along: func.hessian(loss(f), (0, len(leaves) - 1))(*leaves),
    "func.vmap": mapped,
    "func.vmap without gradients": mapped_without_gradients,
    "func.vmap in part": mapped_in_part,
    "func.vmap of func.grad": lambda f, leaves, along: func.vmap(func.grad(loss(f), tuple(range(len(leaves)))), -1)(
        *examples(leaves, along)
    ),
    "func.grad of func.vmap": lambda f, leaves, along: func.grad(loss(func.vmap(f, -1)), tuple(range(len(leaves))))(
        *examples(leaves, along)
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_as_the_definition(case, mode):
    f, shapes = CASES[case]

    def run(dtype: torch.dtype) -> Any:
        def g(*leaves: Tensor) -> Tensor:
            return f(dtype == torch.float32, **dict(zip(shapes, leaves, strict=True)))

        leaves, along = (list(draw(shapes, dtype, seed).values()) for seed in (1, 2))
        return MODES[mode](g, leaves, along)

    got, want = (torch.utils._pytree.tree_leaves(run(dtype)) for dtype in (torch.float32, torch.float64))
    assert any(t.any() for t in want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(
            a.detach().double(), b, rtol=2e-3, atol=2e-3 * max(1.0, float(b.detach().abs().max()))
        )


@pytest.mark.parametrize("case", CASES)
def test_no_examples_at_all(case):
    f, shapes = CASES[case]
    leaves = [t.unsqueeze(0) for t in draw(shapes, torch.float32, 1).values()]
    one, none = (
        func.vmap(lambda *ts: f(True, **dict(zip(shapes, ts, strict=True))))(*(t[:n] for t in leaves)) for n in (1, 0)
    )
    assert none.shape == (0, *one.shape[1:]) and none.dtype == one.dtype


@pytest.mark.parametrize("case", CASES)
def test_traces(case):
    """What is composed looks at no values."""
    f, shapes = CASES[case]
    leaves = list(draw(shapes, torch.float32, 1).values())
    slopes = func.grad(loss(lambda *ts: f(True, **dict(zip(shapes, ts, strict=True)))))
    torch.testing.assert_close(make_fx(slopes)(*leaves)(*leaves), slopes(*leaves))


def test_each_example_may_name_its_own_edits():
    x, base, *pool = (*draw(TOKENS, torch.float32, 1).values(), *NEURONS[True])
    lists = torch.tensor([[1, 0, 1], [0, 1, 0]])
    f = lambda edits: ops.patched_ffn(x, base, ops.EditPool(*pool[:9], edits), activation="gelu")  # noqa: E731
    assert torch.equal(func.vmap(f)(lists), torch.stack([f(edits) for edits in lists]))
    slope = func.grad(
        lambda x, edits: ops.patched_ffn(x, base, ops.EditPool(*pool[:9], edits), activation="gelu").sum()
    )
    torch.testing.assert_close(func.vmap(slope, (None, 0))(x, lists), torch.stack([slope(x, edits) for edits in lists]))
    with pytest.raises(ValueError, match="expected distinct edits in each row"):
        func.vmap(f)(torch.tensor([[1, 0, 1], [0, 1, 1]]))


def test_each_example_may_search_its_own_range():
    queries, keys = draw({"queries": (M, D), "keys": (N, D)}, torch.float32, 1).values()
    ranges = torch.tensor([[[0, 3]] * M, [[2, 4]] * M])
    f = lambda queries, ranges: ops.cosine_topk(queries, keys, K, ranges=ranges)  # noqa: E731
    for got, want in zip(
        func.vmap(f, (None, 0))(queries, ranges), zip(*(f(queries, r) for r in ranges), strict=True), strict=True
    ):
        assert torch.equal(got, torch.stack(want))
    first = lambda queries, ranges: f(queries, ranges)[0][:, :2].sum()  # noqa: E731
    got = func.vmap(func.grad(first), (None, 0))(queries, ranges)
    torch.testing.assert_close(got, torch.stack([func.grad(first)(queries, r) for r in ranges]))


@pytest.mark.parametrize("mode", ["second order", "third order", "func.jvp", "func.hessian"])
def test_what_an_untouched_row_holds_reaches_no_derivative(mode):
    """A token that retrieved nothing, and a query that is not finite, hold what would be NaN in every product."""

    def shifted(queries: Tensor, inputs: Tensor) -> Tensor:
        rows = torch.tensor([[1.0], [1.0], [0.0]])
        inputs = torch.where(rows > 0, inputs, torch.inf)
        return attend(True, torch.where(rows > 0, queries, torch.nan), inputs)[:2]

    def found(queries: Tensor, keys: Tensor) -> Tensor:
        poisoned = torch.where(torch.tensor([[1.0], [1.0], [0.0]]) > 0, queries, torch.inf)
        return scores(True, poisoned, keys)[:2]

    def edited(x: Tensor, base: Tensor, *pool: Tensor) -> Tensor:
        x = torch.where(torch.tensor([[1.0], [1.0], [0.0]]) > 0, x, torch.nan)
        return neurons(True, x, base, **dict(zip(POOL, pool, strict=True)))

    search_of = {"queries": (M, D), "keys": (N, D)}
    for f, shapes in ((shifted, SHIFT), (found, search_of), (edited, TOKENS | POOL)):
        leaves, along = (list(draw(shapes, torch.float32, seed).values()) for seed in (1, 2))
        assert all(t.isfinite().all() for t in torch.utils._pytree.tree_leaves(MODES[mode](f, leaves, along)))


def test_derivatives_of_zero_rows_are_zero():
    """Where a norm has none: in the search, and where nothing was retrieved and Enc_sem of nothing is nothing."""
    zeros = torch.zeros(M, D)
    keys = draw({"keys": (N, D)}, torch.float32, 1)["keys"]
    assert not func.grad(lambda q: scores(True, q, keys).sum())(zeros).any()
    assert not func.jvp(lambda q: ops.normalize_rows(q), (zeros,), (zeros + 1,))[1].any()
    _, _, table, _, _, encoder = MEMORY[True]
    encoder = encoder._replace(b1=torch.zeros(R), b2=torch.zeros(D))
    nothing = torch.full((M, K), -1)
    f = lambda q, h, a: ops.latent_attention(q, h, table[:, 0], table[:, 0], nothing, encoder, anchor=a)[0]  # noqa: E731
    for t in func.hessian(loss(f), (0, 1, 2))(zeros + 1, zeros, zeros)[0]:
        assert not t.any()


def test_what_only_prepares_says_that_it_stays_outside():
    keys = ops.normalize_rows(draw({"keys": (N, D)}, torch.float32, 1)["keys"])
    index = CosineIndex(keys, "float32")
    with pytest.raises(TypeError, match=r"queries: an index searches outside .* ops\.cosine_topk"):
        func.vmap(lambda q: index.search(q, 2))(keys.unsqueeze(1))
    with pytest.raises(RuntimeError, match=r"no memory, as torch\.func wraps them: .* prepares their tables outside"):
        func.grad(lambda t: ops.pack_keys(t, "float16").error_bounds.sum())(keys)
    with pytest.raises(ValueError, match="row 1, 2 holds NaN"):
        func.vmap(ops.normalize_rows)(torch.stack([keys, keys.index_fill(0, torch.tensor(2), torch.nan)]))


def test_tables_prepared_in_a_transformation_outlive_it():
    """They are of the tensors, not of what the transformation made of them."""
    t = draw(TOKENS, torch.float32, 1)
    want = ops.patched_ffn(**t, pool=NEURONS[True], activation="gelu")
    kept = []

    def f(x: Tensor) -> Tensor:
        kept.append(PreparedNeurons(NEURONS[True], "gelu"))
        return kept[0](x, t["base"])

    with torch.no_grad():
        func.jvp(f, (t["x"],), (t["base"],))
        assert kept[0]._native is not None and torch.equal(kept[0](**t), want)
    # Of tensors that are differentiated nothing is laid out.
    g = lambda beta: PreparedNeurons(NEURONS[True]._replace(beta=beta), "gelu")(**t).sum()  # noqa: E731
    beta = NEURONS[True].beta
    definition = lambda b: ops.patched_ffn(**t, pool=NEURONS[True]._replace(beta=b), activation="gelu").sum()  # noqa: E731
    torch.testing.assert_close(func.grad(g)(beta), torch.autograd.functional.jacobian(definition, beta))
    hidden, index, keys, values, projected, encoder = MEMORY[True]
    queries, inputs = draw(SHIFT, torch.float32, 1).values()
    switches = blend_of(queries.unsqueeze(1), 0.7, "inclusion", "match")

    def by_values(values: Tensor) -> Tensor:
        tables = PreparedMemory(index, None, keys, values, projected, encoder)
        return tables(hidden, queries.unsqueeze(1), inputs, K, None, None, None, switches).sum()

    ids = search.cosine_topk(hidden, index, K, True)[1]

    def shifted(values: Tensor) -> Tensor:
        operands = queries.unsqueeze(1), inputs, keys, values, ids, encoder, None, None, switches
        return latent.latent_attention(*operands)[0].sum()

    torch.testing.assert_close(func.grad(by_values)(values), func.grad(shifted)(values))
