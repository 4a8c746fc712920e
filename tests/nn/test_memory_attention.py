"""The drop-in attention, compared with the operators called by hand on its input and output."""

from __future__ import annotations

import copy

import pytest
import torch
from configs import every_token
from torch import nn

from unike_kernels import ops
from unike_kernels.config import Config
from unike_kernels.nn import Generation, MemoryAttention, MemoryTables, ModelContext, Pass, Selection, memory_shift
from unike_kernels.nn._drop_in import class_forward
from unike_kernels.ops.latent_attention import reference
from unike_kernels.retrieval import CosineIndex

B, T, D, N, HEADS = 3, 4, 6, 15, 2
LAST = [1, 3, 2]


class Attention(nn.Module):
    """Mixes neighbouring tokens; returns what a Hugging Face attention may return."""

    def __init__(self, returns=tuple) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, D)
        self.o_proj = nn.Linear(D, D)
        self.returns = returns

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        out = self.o_proj(self.q_proj(hidden_states) + hidden_states.roll(1, 1))
        return out if self.returns is torch.Tensor else (out, "weights")


def heads_of(base, hidden):
    return base.q_proj(hidden).unflatten(-1, (HEADS, -1))


def encoder():
    return ops.SemanticEncoder(torch.randn(3, D), torch.randn(3), torch.randn(D, 3), torch.randn(D))


def tables(values="out", **kwargs):
    projected = values == "projected"
    keys = torch.randn(N, HEADS, D // HEADS) if projected else torch.randn(N, 1, D)
    own = None if values == "pre" else torch.randn(N, keys.shape[1], D)
    return MemoryTables(torch.randn(N, D) * 3, keys, own, encoder(), **kwargs)


def make(config=None, context=None, returns=tuple, **kwargs):
    """A drop-in with a memory, hidden states, and the base's own output."""
    config = config or every_token(k=3)
    base = Attention(returns)
    project = heads_of if config.values == "projected" else None
    new = MemoryAttention.from_module(base, config, context=context, project=project, **kwargs)
    memory_shift(new).memory = tables(config.values)
    hidden = torch.randn(B, T, D)
    out = class_forward(new)(hidden)
    return new, hidden, out[0] if returns is tuple else out


def in_pass(module, hidden, ranges=None, saved=None, **what):
    """What the module puts out in a pass like this one: the tokens to shift, the prompt's end, ranges of the rows."""
    generation = Generation(saved={} if saved is None else saved)
    version, selection = memory_shift(module).context.current, Selection(memory_ranges=ranges)
    made = Pass(version, selection, prompted=True, generation=generation, **what)
    with memory_shift(module).context.running(made):
        return module(hidden)[0]


def values_of(m):
    return m.keys if m.values is None else m.values


def by_hand(new, hidden, out, **kwargs):
    """memory_attention of all tokens."""
    m, config = memory_shift(new).memory, memory_shift(new).config
    queries = heads_of(new, hidden.reshape(-1, D)) if config.values == "projected" else None
    switches = {"scale": config.scale, "convention": config.convention, "norm": config.norm, "k": config.k}
    shifted, alpha, ids = ops.memory_attention(
        hidden.reshape(-1, D), out.reshape(-1, D), m.index, m.keys, values_of(m), m.encoder,
        queries=queries, packed=m.packed, projected=m.projected, **switches | kwargs,
    )  # fmt: skip
    return shifted.reshape(out.shape), alpha, ids


def test_without_a_memory_the_result_is_the_base_s_own():
    base, hidden = Attention(), torch.randn(B, T, D)
    own = base(hidden)[0]
    new = MemoryAttention.from_module(base, every_token())
    assert new is base and isinstance(new, Attention) and memory_shift(new).memory is None
    assert torch.equal(new(hidden)[0], own)
    memory_shift(new).memory = tables()
    assert not torch.equal(new(hidden)[0], own)
    memory_shift(new).memory = None
    assert torch.equal(new(hidden)[0], own)


def test_a_context_of_its_own_or_a_shared_one():
    shared = ModelContext()
    one, two = (MemoryAttention.from_module(Attention(), every_token(), context=shared) for _ in range(2))
    assert memory_shift(one).context is shared and memory_shift(two).context is shared
    assert isinstance(memory_shift(MemoryAttention.from_module(Attention(), every_token())).context, ModelContext)


def test_the_tables_keep_unit_rows_for_the_index():
    m = tables()
    torch.testing.assert_close(m.index.norm(dim=1), torch.ones(N), rtol=0, atol=1e-6)
    assert m.encoder.w2 is m.w2 and m.state_dict() == {}
    m.half()
    assert m.index.dtype == m.keys.dtype == torch.float32


@pytest.mark.parametrize("returns", [tuple, torch.Tensor])
@pytest.mark.parametrize("call", ["positional", "keyword"])
def test_each_form_of_a_call_and_of_a_result(call, returns):
    new, hidden, out = make(returns=returns)
    got = new(hidden_states=hidden, attention_mask=None) if call == "keyword" else new(hidden, None, other=1)
    if returns is tuple:
        assert got[1:] == ("weights",)
        got = got[0]
    wanted, alpha, _ = by_hand(new, hidden, out)
    assert torch.equal(got, wanted) and alpha.any()
    assert not torch.equal(got, out)


@pytest.mark.parametrize(
    ("switches", "arguments"),
    [
        ({}, {}),
        ({"k": 1}, {"k": 1}),
        ({"k": 40}, {"k": 40}),
        ({"scale": 2.0}, {"scale": 2.0}),
        ({"convention": "eq7"}, {"convention": "eq7"}),
        ({"norm": "none"}, {"norm": "none"}),
        ({"alpha": 0.3}, {"alpha": torch.tensor([0.3])}),
        ({"alpha": 1}, {"alpha": torch.tensor([1.0])}),
        ({"values": "pre"}, {}),
        ({"values": "out"}, {}),
        ({"values": "projected"}, {}),
    ],
)
def test_each_switch_reaches_the_operator(switches, arguments):
    new, hidden, out = make(every_token(**{"k": 3} | switches))
    got = new(hidden)[0]
    assert torch.equal(got, by_hand(new, hidden, out, **arguments)[0])
    if switches and "values" not in switches:
        plain = {"k": 3, "scale": None, "convention": "inclusion", "norm": "match"}
        assert not torch.equal(got, by_hand(new, hidden, out, **plain)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["fused", "retriever", "sequence", "compiling"])
@pytest.mark.parametrize("values", ["pre", "out", "projected"])
def test_logits_are_cosines(values, how, dtype, monkeypatch):
    """On each way: cos(query, key) / tau, values as they are; of short and of long queries."""
    config = every_token(
        k=3, values=values, scale="cosine", tau=0.2, retrieval="sequence" if how == "sequence" else "token"
    )
    new, hidden, _ = make(config)
    given = tables(values)
    keys, raw = given.keys.double(), values_of(given).double()
    index = CosineIndex(given.retrieval_keys) if how == "retriever" else None
    made = MemoryTables(given.retrieval_keys, given.keys, given.values, given.encoder, None, index, cosine=True)
    memory_shift(new).memory = made
    hidden = hidden * torch.tensor([1e-3, 1.0, 1e3]).view(B, 1, 1)
    new, hidden = new.to(dtype), hidden.to(dtype)
    out = class_forward(new)(hidden)[0]
    if how == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    got = in_pass(new, hidden, last=torch.tensor(LAST))
    monkeypatch.undo()

    flat = hidden.reshape(-1, D)
    asks = torch.stack([hidden[row, t] for row, t in enumerate(LAST)]) if how == "sequence" else flat
    _, ids = ops.cosine_topk(asks, ops.normalize_rows(given.retrieval_keys), 3, normalized=True)
    queries = heads_of(new, flat) if values == "projected" else flat.unsqueeze(1)
    unit = [torch.nn.functional.normalize(t.double(), dim=-1) for t in (queries, keys)]
    wanted, _ = reference.latent_attention(
        unit[0], out.reshape(-1, D).double(), unit[1], raw, ids, reference.SemanticEncoder(*(
            t.double() for t in made.encoder)), None, None, reference.Blend(5.0, "inclusion", "match"),
    )  # fmt: skip
    away = (got.reshape(-1, D).double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert away.max() < (0.05 if dtype == torch.bfloat16 else 5e-5)
    assert torch.equal(values_of(made), values_of(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_query_of_zeros_has_cosines_of_zero(dtype):
    """And one whose norm is beyond float16 has its cosines; both have gradients."""
    new, hidden, _ = make(every_token(k=3, scale="cosine", alpha=0.5))
    memory_shift(new).memory = tables(cosine=True)
    hidden[0, 1], hidden[1, 2] = hidden[0, 1] * 3e4 / hidden[0, 1].abs().max(), 0
    hidden[0, 1, :3] = 6e4
    wanted = new(hidden)[0].detach()
    new, hidden = new.to(dtype), hidden.to(dtype)
    hidden.requires_grad_()
    got = new(hidden)[0]
    got.sum().backward()
    assert got.isfinite().all() and hidden.grad.isfinite().all()
    away = (got.detach().float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert away.max() < (0.02 if dtype == torch.float16 else 1e-6)


def test_a_table_of_values_is_what_is_read():
    new, hidden, _ = make(every_token(k=3, values="out"))
    before = new(hidden)[0]
    memory_shift(new).memory.values = memory_shift(new).memory.keys
    assert not torch.equal(new(hidden)[0], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_fixed_alpha_is_as_exact_as_the_model(dtype):
    new, hidden, _ = make(every_token(k=3, alpha=0.3))
    hidden = hidden.to(dtype)
    out = class_forward(new.to(dtype))(hidden)[0]
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(new(hidden)[0], by_hand(new, hidden, out, alpha=torch.tensor([0.3], dtype=wide))[0])


def test_tokens_that_may_not_be_shifted_are_untouched():
    new, hidden, out = make()
    shifted = torch.tensor([[False, True, True, True], [True] * 4, [True, False, False, True]])
    got = in_pass(new, hidden, shifted=shifted)
    wanted = by_hand(new, hidden, out)[0]
    assert torch.equal(got, torch.where(shifted.unsqueeze(-1), wanted, out))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("retrieval", ["token", "sequence"])
def test_each_row_has_its_own_part_of_the_memory(retrieval, masked):
    new, hidden, out = make(every_token(k=3, retrieval=retrieval, values="out"))
    ranges = torch.tensor([[-1, -1], [0, 0], [4, 9]])
    shifted = torch.ones(B, T, dtype=torch.bool)
    shifted[:, 0] = False
    got = in_pass(new, hidden, ranges, shifted=shifted if masked else None, last=torch.tensor(LAST))
    assert torch.equal(got[1], out[1])
    assert torch.equal(got[:, 0], out[:, 0]) == masked
    for row in (0, 2):
        m, part = memory_shift(new).memory, {0: slice(0, N), 2: slice(4, 9)}[row]
        alone = MemoryTables(m.index[part], m.keys[part], m.values[part], m.encoder)
        single = copy.deepcopy(new)
        memory_shift(single).memory = alone
        wanted = in_pass(single, hidden[row : row + 1], last=torch.tensor(LAST[row : row + 1]))[0]
        start = int(masked)
        torch.testing.assert_close(got[row, start:], wanted[start:], rtol=0, atol=1e-5)


def test_beams_share_the_bounds_of_their_row():
    new, hidden, _ = make()
    expected = in_pass(new, hidden, torch.tensor([[0, N]]))
    assert torch.equal(new(hidden)[0], expected)
    twice = in_pass(new, hidden[:2].repeat_interleave(2, 0), torch.tensor([[0, N], [0, 0]]))
    out = class_forward(new)(hidden[1:2])[0]
    torch.testing.assert_close(twice[:2], expected[:1].expand(2, T, D), rtol=0, atol=1e-5)
    torch.testing.assert_close(twice[2:], out.expand(2, T, D), rtol=0, atol=1e-6)


@pytest.mark.parametrize("retrieval", ["token", "sequence"])
@pytest.mark.parametrize("alpha", ["token", "last", 0.3])
def test_what_depends_on_the_prompts_end(alpha, retrieval):
    config = every_token(k=3, retrieval=retrieval, alpha=alpha)
    new, hidden, out = make(config, layer=7)
    saved = {}
    first = in_pass(new, hidden, last=torch.tensor(LAST), saved=saved)
    m = memory_shift(new).memory
    ends = torch.stack([out[row, t] for row, t in enumerate(LAST)])
    queries = torch.stack([hidden[row, t] for row, t in enumerate(LAST)])
    _, ids = ops.cosine_topk(queries, m.index, 3, normalized=True)
    gate = {"anchor": ends} if alpha == "last" else {"alpha": torch.tensor([0.3])} if alpha == 0.3 else {}

    def wanted(hidden, out):
        if retrieval == "token":
            return by_hand(new, hidden, out, **gate)[0]
        flat, inputs = hidden.reshape(-1, D), out.reshape(-1, D)
        shifted, _ = ops.latent_attention(
            flat, inputs, m.keys, values_of(m), ids, m.encoder, projected=m.projected, **gate
        )
        return shifted.reshape(out.shape)

    assert torch.equal(first, wanted(hidden, out))
    names = {"anchor"} if alpha == "last" else set()
    names |= {"ids"} if retrieval == "sequence" else set()
    assert set(saved) == {(7, name) for name in names}
    # The next token: what the prompt left behind still holds.
    step = torch.randn(B, 1, D)
    assert torch.equal(in_pass(new, step, saved=saved), wanted(step, class_forward(new)(step)[0]))


@pytest.mark.parametrize("switches", [{"alpha": "last"}, {"retrieval": "sequence"}])
def test_the_prompts_end_must_be_known(switches):
    new, hidden, _ = make(every_token(k=3, **switches))
    with pytest.raises(ValueError, match="prompt_lengths"):
        new(hidden)
    with pytest.raises(ValueError, match="the prompt itself was not seen"):
        in_pass(new, hidden)


def test_layers_remember_for_themselves():
    context, saved = ModelContext(), {}
    config = every_token(k=3, retrieval="sequence")
    for layer in (0, 1):
        new, hidden, _ = make(config, context, layer=layer)
        in_pass(new, hidden, last=torch.tensor(LAST), saved=saved)
    assert set(saved) == {(0, "ids"), (1, "ids")}
    assert not torch.equal(*saved.values())


def test_gradients_flow_through_the_shift():
    new, hidden, _ = make(every_token(k=3, alpha=0.5))
    hidden.requires_grad_()
    new(hidden)[0].square().sum().backward()
    base = class_forward(new)(hidden)[0]
    plain = torch.autograd.grad(base.square().sum(), hidden)[0]
    assert hidden.grad.any() and not torch.allclose(hidden.grad, plain)
    assert new.o_proj.weight.grad.any()


def test_a_pass_that_did_not_come_through_the_model_is_an_error():
    new, hidden, _ = make()
    with pytest.raises(RuntimeError, match=r"got hidden states of \[3, 4\] tokens, the decoder announced \[3, 5\]"):
        in_pass(new, hidden, shifted=torch.ones(B, T + 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("base", "config", "error", "message"),
    [
        (torch.relu, every_token(), TypeError, "base: expected nn.Module, got builtin_function_or_method"),
        (Attention(), Config(values="projected"), ValueError, "project: expected a function"),
    ],
)
def test_wrong_arguments_are_errors(base, config, error, message):
    with pytest.raises(error, match=message):
        MemoryAttention.from_module(base, config)
