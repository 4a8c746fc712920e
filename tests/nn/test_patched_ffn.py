"""The store of edits and the drop-in FFN, compared with the operator called by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from unike_kernels import ops
from unike_kernels.artifacts.edit import EditLayer
from unike_kernels.backbones import find_decoder
from unike_kernels.errors import PatchError
from unike_kernels.nn import LayerEdits, PatchedFFN, Selection, extra_neurons, patched_ffn
from unike_kernels.nn.layer_edits import csr

D = 4


def layer(n, gated=False, dtype=torch.float32):
    def rand(*shape):
        return torch.randn(shape).to(dtype)

    return EditLayer(
        keys=rand(n, D), key_bias=rand(n), values=rand(n, D), zeta=rand(D), beta=rand(),
        up=rand(n, D) if gated else None, up_bias=rand(n) if gated else None,
    )  # fmt: skip


def store_of(**layers):
    store = LayerEdits()
    store.set(layers)
    return store


def alone(x, base, edit, activation="silu"):
    """base + the neurons of one edit."""
    return ops.patched_ffn(x, base, store_of(only=edit).pool(), activation=activation)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, 6), nn.SiLU(), nn.Linear(6, D)

    def forward(self, hidden_states, factor=1.0):
        return self.fc2(self.act(self.fc1(hidden_states))) * factor


def test_csr():
    for rows in ([[0, 2], [], [1]], [[], []], [[3]], []):
        indptr, indices = csr(rows, "cpu")
        assert indptr.dtype == indices.dtype == torch.int64
        assert [indices[a:b].tolist() for a, b in pairwise(indptr)] == rows


def test_the_pool_holds_the_edits_one_after_the_other():
    layers = {"a": layer(3), "b": layer(0), "c": layer(2)}
    pool = store_of(**layers).pool()
    assert pool.indptr.tolist() == [0, 3, 3, 5]
    assert (pool.row_indptr.tolist(), pool.row_edits.tolist()) == ([0, 3], [0, 1, 2])
    assert pool.up is None and pool.up_bias is None and pool.token_rows is None
    for e, (start, stop) in enumerate(((0, 3), (3, 3), (3, 5))):
        one = list(layers.values())[e]
        for name in ("keys", "key_bias", "values"):
            assert torch.equal(getattr(pool, name)[start:stop], getattr(one, name))
        assert torch.equal(pool.zeta[e], one.zeta) and torch.equal(pool.beta[e], one.beta)


def test_a_plain_edit_among_gated_ones_stays_plain():
    x, base = torch.randn(6, D), torch.randn(6, D)
    plain, gated = layer(3), layer(2, gated=True)
    store = store_of(plain=plain, gated=gated)
    assert torch.equal(store.up[3:], gated.up) and torch.equal(store.up_bias[3:], gated.up_bias)
    for name, edit in (("plain", plain), ("gated", gated)):
        got = ops.patched_ffn(x, base, store.pool([[name]]), activation="silu")
        assert torch.equal(got, alone(x, base, edit))


def test_selections():
    store = store_of(a=layer(1), b=layer(1), c=layer(1))
    rows = [["c", "a"], [], ["elsewhere", "b"]]
    for pool in (store.pool(rows), store.pool(selected=store.csr(rows))):
        assert (pool.row_indptr.tolist(), pool.row_edits.tolist()) == ([0, 2, 2, 3], [2, 0, 1])
    pool = store.pool([[], []])
    assert (pool.row_indptr.tolist(), pool.row_edits.tolist()) == ([0, 0, 0], [])
    assert (store.pool().row_indptr.tolist(), store.pool().row_edits.tolist()) == ([0, 3], [0, 1, 2])


def test_an_empty_store():
    store = store_of(a=layer(2, gated=True))
    store.set({})
    assert store.ids == [] and all(t is None for t in store._buffers.values())
    assert store.empty


def test_set_replaces_all_that_was_there():
    store = store_of(a=layer(2, gated=True), b=layer(1))
    new = layer(3)
    store.set({"c": new})
    assert store.ids == ["c"] and store.up is None
    assert torch.equal(store.keys, new.keys) and store.pool().row_edits.tolist() == [0]


def test_gradients_reach_the_edits():
    edit = layer(2)
    for t in edit.tensors().values():
        t.requires_grad_()
    new = PatchedFFN.from_module(Mlp(), activation="silu")
    extra_neurons(new).edits.set({"frozen": layer(3), "trained": edit})
    new(torch.randn(5, D)).sum().backward()
    assert all(t.grad is not None and t.grad.any() for t in edit.tensors().values())


def test_from_a_module():
    x, mlp = torch.randn(2, 3, D), Mlp()
    plain, double = mlp(x), mlp(x, factor=2.0)
    new = PatchedFFN.from_module(mlp, activation="silu")
    assert new is mlp and isinstance(new, Mlp) and isinstance(new, PatchedFFN)
    assert torch.equal(new(x), plain)
    one, two = layer(2), layer(3)
    neurons = extra_neurons(new)
    neurons.edits.set({"one": one, "two": two})
    with neurons.context.selecting(Selection(rows=2, edits=(("two",), ()))):
        out = new(x)
        assert torch.equal(out[0], alone(x, plain, two)[0])
        assert torch.equal(out[1], plain[1])
        assert torch.equal(new(x, factor=2.0)[1], double[1])
    wanted = ops.patched_ffn(x, plain, neurons.edits.pool(), activation="silu")
    assert torch.equal(new(hidden_states=x), wanted)
    assert not torch.equal(wanted[1], out[1])


def test_the_activation_is_that_of_the_extra_neurons():
    x, edit = torch.randn(2, 3, D), layer(2)
    for activation in ops.ACTIVATIONS:
        mlp = Mlp()
        plain = mlp(x)
        extra_neurons(PatchedFFN.from_module(mlp, activation=activation)).edits.set({"a": edit})
        assert torch.equal(mlp(x), alone(x, plain, edit, activation))


def test_a_module_is_adopted_once():
    mlp = Mlp()
    PatchedFFN.from_module(mlp, activation="silu")
    with pytest.raises(PatchError, match="this Mlp is patched already"):
        PatchedFFN.from_module(mlp, activation="silu")
    with pytest.raises(PatchError, match="Linear is not a patched FFN"):
        extra_neurons(mlp.fc1)


class Inline(nn.Module):
    """A layer with its FFN inline, as OPT has it: tokens of all rows in one dimension."""

    def __init__(self, mlp) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = mlp.fc1, mlp.act, mlp.fc2

    def forward(self, x):
        flat = x.reshape(-1, D)
        return (flat + self.fc2(self.activation_fn(self.fc1(flat)))).view(x.shape)


def adopted(block, edit, **more):
    PatchedFFN.from_module(block.fc1, block.activation_fn, block.fc2, activation="silu", **more)
    neurons = extra_neurons(block.fc1)
    neurons.edits.set({} if edit is None else {"a": edit})
    return neurons


def test_from_the_parts_of_an_inline_ffn():
    x, mlp = torch.randn(2, 3, D), Mlp()
    block = Inline(mlp)
    before, keys, objects = block(x), list(block.state_dict()), list(block.children())
    neurons = adopted(block, None)
    assert isinstance(block.fc1, nn.Linear) and isinstance(block.fc2, nn.Linear)
    assert list(block.children()) == objects and list(block.state_dict()) == keys
    assert extra_neurons(block.activation_fn) is extra_neurons(block.fc2) is neurons
    assert torch.equal(block(x), before)
    edit = layer(2)
    neurons.edits.set({"a": edit})
    with neurons.context.selecting(Selection(rows=2, edits=((), ("a",)))):
        out = block(x)
    assert torch.equal(out[0], before[0])
    flat = x.reshape(-1, D)
    base = (before - x).reshape(-1, D)
    torch.testing.assert_close(out[1], (flat + alone(flat, base, edit)).view(x.shape)[1])
    assert not torch.allclose(out[1], before[1])
    assert neurons.context.inputs == {}  # nothing is kept


def test_the_parts_of_an_inline_ffn_stay_what_they_are():
    """Another activation, hooks in between, and what the parts are given and return."""
    x, edit = torch.randn(1, 3, D), layer(2)
    mlp = Mlp()
    block = Inline(mlp)
    adopted(block, edit)
    seen = {}
    block.activation_fn = nn.ReLU()
    block.activation_fn.register_forward_hook(lambda m, args, out: seen.update(between=args[0]) or 2 * out)
    flat = x.reshape(-1, D)
    inside = nn.functional.linear(flat, mlp.fc1.weight, mlp.fc1.bias)
    base = nn.functional.linear(2 * inside.relu(), mlp.fc2.weight, mlp.fc2.bias)
    assert torch.equal(block(x), (flat + alone(flat, base, edit)).view(x.shape))
    assert torch.equal(seen["between"], inside)


def test_the_last_part_needs_the_first():
    block = Inline(Mlp())
    neurons = adopted(block, layer(2))
    with pytest.raises(PatchError, match="last part of the FFN of layer 0 was called without the first one"):
        block.fc2(torch.randn(2, 6))
    neurons.edits.set({})
    assert block.fc2(torch.randn(2, 6)).shape == (2, D)


def test_layers_may_share_an_activation_and_nothing_else():
    x, edit = torch.randn(1, 3, D), layer(2)
    one, two = Inline(Mlp()), Inline(Mlp())
    two.activation_fn = one.activation_fn
    plain = two(x)
    context = adopted(one, edit).context
    adopted(two, edit, context=context, layer=1)
    base = (plain - x).reshape(-1, D)
    torch.testing.assert_close(two(x), (x.reshape(-1, D) + alone(x.reshape(-1, D), base, edit)).view(x.shape))
    three = Inline(Mlp())
    three.fc2 = one.fc2
    with pytest.raises(PatchError, match="this Linear is patched already"):
        adopted(three, edit, context=context, layer=2)
    assert type(three.fc1) is nn.Linear and 2 not in context.current.edits


def test_casting_the_model_leaves_the_edits_as_they_are():
    new = PatchedFFN.from_module(Mlp(), activation="silu")
    extra_neurons(new).edits.set({"a": layer(2)})
    new.to(torch.bfloat16)
    assert new.fc1.weight.dtype == torch.bfloat16 and extra_neurons(new).edits.keys.dtype == torch.float32
    assert new(torch.randn(2, D).bfloat16()).dtype == torch.bfloat16
    assert all("edits" not in name for name in new.state_dict())


@pytest.mark.parametrize(
    ("base", "activation", "error", "message"),
    [
        ((Mlp(),), "tanh", ValueError, r"activation: expected one of relu, .*; got 'tanh'"),
        ((), "relu", TypeError, r"base: expected nn.Module, got \[\]"),
        ((Mlp(), torch.relu), "relu", TypeError, r"base: expected nn.Module, got \['Mlp', 'builtin_function"),
    ],
)
def test_wrong_arguments_are_errors(base, activation, error, message):
    with pytest.raises(error, match=message):
        PatchedFFN.from_module(*base, activation=activation)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi3"])
def test_few_tokens_on_a_gpu_are_one_launch(kind, on_gpu, monkeypatch):
    """Base and neurons together, unless somebody looks in between, or asks for gradients."""
    from backbones.zoo import ZOO, model_of

    model = model_of(ZOO[kind], torch.float32)
    layer = find_decoder(model).layers[2]
    site = layer.ffn[0]
    neurons = EditLayer(torch.randn(3, 64) / 8, torch.randn(3), torch.randn(3, 64), torch.randn(64), torch.tensor(0.1))
    ffn = PatchedFFN.from_module(site.module, activation=layer.activation, dense=layer.dense)
    extra_neurons(ffn).edits.set({"a": neurons})
    monkeypatch.setattr(patched_ffn, "on_gpu", lambda t: True)

    def launches(x, schedule="lockstep"):
        with on_gpu(schedule=schedule) as session, ops.backend("triton"):
            out = ffn(x)
        return [launch.kernel for launch in session.launches], out

    x = torch.randn(1, 2, 64)
    wanted = ffn(x)  # by the CPU's kernels, as there is no GPU
    with torch.no_grad():
        transposed = kind == "gpt2"  # its weights would have to be copied
        assert launches(x)[0] == ["add_extra_neurons_kernel" if transposed else "patched_ffn_kernel"]
        torch.testing.assert_close(launches(x)[1], wanted, rtol=1e-4, atol=1e-4)
        assert launches(torch.randn(65, 64))[0] == ["add_extra_neurons_kernel"]
        handle = next(site.module.children()).register_forward_hook(lambda *_: None)
        assert launches(x)[0] == ["add_extra_neurons_kernel"]
        handle.remove()
    assert launches(x)[0] == ["add_extra_neurons_kernel"]


def changed_ffn(ffn):
    """What may be done to an FFN after it was probed."""
    linear = next(m for m in ffn.modules() if hasattr(m, "weight"))
    return {
        "nothing": lambda: None,
        "a forward": lambda: vars(linear).update(forward=type(linear).forward.__get__(linear)),
        "a child": lambda: linear.add_module("more", nn.Identity()),
        "a parametrization": lambda: nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity()),
        "another parameter": lambda: setattr(linear, "weight", Quantized(linear.weight)),
        "a hook inside": lambda: linear.register_forward_pre_hook(lambda *_: None),
        "a hook around": lambda: ffn.register_forward_hook(lambda *_: None),
    }


class Quantized(nn.Parameter):
    """Stands for a parameter that is no plain one."""


@pytest.mark.parametrize("what", changed_ffn(nn.Linear(1, 1)))
def test_a_changed_ffn_is_not_fused(what, monkeypatch):
    from backbones.zoo import ZOO, model_of

    layer = find_decoder(model_of(ZOO["llama"], torch.float32)).layers[2]
    ffn = PatchedFFN.from_module(layer.ffn[0].module, activation="silu", dense=layer.dense)
    monkeypatch.setattr(patched_ffn, "on_gpu", lambda t: True)
    changed_ffn(ffn)[what]()
    with torch.no_grad():
        assert extra_neurons(ffn)._may_fuse(torch.randn(1, 2, 64)) == (what in ("nothing", "a hook around"))


def test_few_tokens_of_an_inline_ffn_are_one_launch(on_gpu, monkeypatch):
    """The first part gives it all, the others pass it on; together they are called as ever."""
    from backbones.zoo import ZOO, model_of

    layer = find_decoder(model_of(ZOO["opt"], torch.float32)).layers[2]
    fc1, act, fc2 = (site.module for site in layer.ffn)
    x = torch.randn(2, 64)
    edit = EditLayer(torch.randn(3, 64) / 8, torch.randn(3), torch.randn(3, 64), torch.randn(64), torch.tensor(0.1))
    PatchedFFN.from_module(fc1, act, fc2, activation="relu", dense=layer.dense)
    neurons = extra_neurons(fc1)
    neurons.edits.set({"a": edit})
    whole = lambda: fc2(act(fc1(x)))  # noqa: E731
    wanted = whole()
    monkeypatch.setattr(patched_ffn, "on_gpu", lambda t: True)

    def launches():
        with on_gpu(schedule="lockstep") as session, ops.backend("triton"), torch.no_grad():
            out = whole()
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
        assert neurons.context.inputs == {}
        return [launch.kernel for launch in session.launches]

    assert launches() == ["patched_ffn_kernel"]
    handle = fc2.register_forward_pre_hook(lambda *_: None)
    assert launches() == ["add_extra_neurons_kernel"]
    handle.remove()
    assert launches() == ["patched_ffn_kernel"]
    neurons.dense = None  # what a model does whose parts are not called alone
    assert launches() == ["add_extra_neurons_kernel"]


# --- edits that are being trained ------------------------------------------------------------------------------------


def trained_store():
    """A store with room to spare, a removed edit in front, and others around the one that is trained."""
    store = store_of(gone=layer(2), first=layer(3, gated=True))
    store.spare()
    edit = layer(2)
    return store.without("gone").with_edit("trained", edit).with_edit("last", layer(1)), edit


def by_hand(x, base, edit):
    return base + nn.functional.silu(x @ edit.keys.T + edit.key_bias) @ (edit.values + edit.beta * edit.zeta)


@pytest.mark.parametrize("asks", ["before", "after"])
def test_what_is_trained_computes(asks):
    x, base = torch.randn(5, D), torch.randn(5, D)
    store, edit = trained_store()
    leaves = [edit.keys, edit.key_bias, edit.values, edit.zeta, edit.beta]
    if asks == "before":
        for t in leaves:
            t.requires_grad_()
        store = store.without("trained").with_edit("trained", edit)
    compute = lambda: ops.patched_ffn(x, base, store.pool([["trained"]]), activation="silu")  # noqa: E731
    view = lambda: store.view("silu", (("trained",),))(x, base)  # noqa: E731
    with torch.no_grad():
        view()
    for t in leaves:
        t.requires_grad_()
    others = store.layer("first").keys.clone(), store.layer("last").values.clone()
    for _ in range(2):
        with torch.no_grad():
            wanted = alone(x, base, edit)
            assert torch.equal(compute(), wanted)
        out = compute()
        assert torch.equal(out, wanted)
        found = torch.autograd.grad(out.square().sum(), leaves)
        expected = torch.autograd.grad(by_hand(x, base, edit).square().sum(), leaves)
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            for t, grad in zip(leaves, found, strict=True):
                t.sub_(0.1 * grad)
            assert torch.equal(view(), alone(x, base, edit))
    for t in leaves:  # the last step, and nobody asks for gradients any more
        t.requires_grad_(False)
    assert torch.equal(compute(), alone(x, base, edit))
    for t in leaves:
        t.add_(0.1)
    with torch.no_grad():
        assert torch.equal(view(), alone(x, base, edit)) and torch.equal(compute(), alone(x, base, edit))
    assert torch.equal(store.layer("first").keys, others[0]) and torch.equal(store.layer("last").values, others[1])


def test_changes_of_a_store_in_training():
    x, base = torch.randn(5, D), torch.randn(5, D)
    store, edit = trained_store()
    edit.values.requires_grad_()
    with torch.no_grad():
        edit.values.add_(1)
    for changed in (store.with_edit("new", layer(1)), store.without("last"), store.with_beta("first", 0.5)):
        changed.pool()
        with torch.no_grad():
            edit.values.add_(1)
            assert torch.equal(changed.view("silu", (("trained",),))(x, base), alone(x, base, edit))
    other = store.with_beta("trained", 0.7)
    other.pool()
    with torch.no_grad():
        edit.values.add_(1)
        now = replace(edit, beta=torch.tensor(0.7))
        assert torch.equal(other.view("silu", (("trained",),))(x, base), alone(x, base, now))
    assert "trained" not in store.without("trained").given


def test_a_copy_of_a_store_in_training_is_refused():
    store, edit = trained_store()
    assert torch.equal(copy.deepcopy(store).keys, store.keys)
    edit.keys.requires_grad_()
    store.pool()
    with pytest.raises(PatchError, match=r"edits \['trained'\]: their tensors ask for gradients"):
        copy.deepcopy(store)
