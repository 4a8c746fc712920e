"""A drop-in shares everything with the module that it stands for, and can be undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from unike_kernels.config import Config
from unike_kernels.nn import MemoryAttention, PassThrough, PatchedFFN, original
from unike_kernels.nn._drop_in import Tables


class Block(nn.Module):
    """Parameters, buffers and children of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("shift", torch.rand(4))
        self.register_buffer("cache", torch.rand(4), persistent=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden_states):
        return self.drop(self.fc2(self.fc1(hidden_states).relu())) * self.scale + self.shift + self.cache


DROP_INS = {
    "ffn": lambda base: PatchedFFN.from_module(base, activation="relu"),
    "attention": lambda base: MemoryAttention.from_module(base, Config()),
}
drop_ins = pytest.mark.parametrize("make", DROP_INS.values(), ids=DROP_INS)
X = torch.arange(8.0).reshape(1, 2, 4)


class Parent(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        return self.child(x)


@pytest.fixture
def base():
    return Block().eval()


def own(named, new):
    """Without what the drop-in itself brings along."""
    return {name: value for name, value in named if name.split(".")[0] != "edits" and value is not new}


@drop_ins
def test_the_clone_has_the_class_the_tensors_and_the_children_of_the_base(make, base):
    new = make(base)
    assert isinstance(new, Block)
    assert type(new).__bases__ == (type(new).__mro__[1], Block)
    assert type(new) is type(make(Block())) and type(new).__name__.endswith("Block")
    assert [(n, id(p)) for n, p in new.named_parameters()] == [(n, id(p)) for n, p in base.named_parameters()]
    assert list(new.state_dict()) == list(base.state_dict())
    for kind in ("named_buffers", "named_children", "named_modules"):
        ours, theirs = own(getattr(new, kind)(), new), own(getattr(base, kind)(), base)
        assert {n: id(v) for n, v in ours.items()} == {n: id(v) for n, v in theirs.items()}
    assert new.originals == (base,)
    assert all(module is not base for module in new.modules())
    assert torch.equal(new(X), base(X))


@drop_ins
def test_putting_the_original_back_undoes_everything(make, base):
    parent, before = Parent(base), {name: id(value) for name, value in vars(base).items()}
    children, state = dict(base.named_children()), base.state_dict()
    parent.child = make(base)
    parent.child.note = "only on the clone"
    parent.child.extra = nn.Linear(1, 1)
    parent(X)
    parent.child = original(parent.child)
    assert parent.child is base
    assert {name: id(value) for name, value in vars(base).items()} == before
    assert dict(base.named_children()) == children and base.state_dict().keys() == state.keys()


def test_the_original_of_another_module_is_itself(base):
    assert original(base) is base


@drop_ins
def test_train_and_eval_reach_the_original(make, base):
    new = make(base)
    for mode in (True, False, True):
        assert new.train(mode) is new
        assert new.training == base.training == base.drop.training == mode
    assert new.eval() is new and not base.training
    parent = Parent(new).train()
    assert base.training and parent.child.training


def test_train_reaches_all_originals():
    parts = [nn.Dropout(), nn.Dropout(), nn.Dropout()]
    new = PatchedFFN.from_module(*parts, activation="relu").eval()
    assert not any(part.training for part in parts)
    new.train()
    assert all(part.training for part in parts)


@drop_ins
def test_hooks_of_the_original_run_once_and_stay_with_it(make, base):
    ran = []
    base.register_forward_pre_hook(lambda *_: ran.append("pre"))
    base.register_forward_pre_hook(lambda *_, **__: ran.append("pre kwargs"), with_kwargs=True)
    base.register_forward_hook(lambda *_: ran.append("post"))
    base.register_forward_hook(lambda m, a, k, out: ran.append("post kwargs"), with_kwargs=True)
    base.register_forward_hook(lambda *_: ran.append("always"), always_call=True)
    base.register_full_backward_pre_hook(lambda *_: ran.append("backward pre"))
    base.register_full_backward_hook(lambda *_: ran.append("backward"))
    new = make(base)
    new(X.clone().requires_grad_()).sum().backward()
    expected = ["pre", "pre kwargs", "post", "post kwargs", "always", "backward pre", "backward"]
    assert sorted(ran) == sorted(expected)
    ran.clear()
    new.register_forward_hook(lambda *_: ran.append("clone"))
    base(X)
    assert "clone" not in ran and len(ran) == 5
    ran.clear()
    new(X)
    assert ran.count("clone") == 1 and len(ran) == 6


@drop_ins
def test_a_forward_of_the_instance_runs_with_the_original(make, base):
    """As offloading installs it: on the module object, calling the class's forward."""
    calls = []
    inner = base.forward
    base.forward = lambda x: (calls.append(1), inner(x) + 1)[1]
    new = make(base)
    assert torch.equal(new(X), inner(X) + 1)
    assert calls == [1]


def copies(module):
    return {"deepcopy": copy.deepcopy(module), "pickle": pickle.loads(pickle.dumps(module))}


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@drop_ins
def test_a_copy_shares_within_itself_and_nothing_with_its_source(make, way, base):
    new = make(base)
    parent = copies(Parent(new))[way]
    twin = parent.child
    assert type(twin) is type(new) and twin is not new
    (again,) = twin.originals
    assert type(again) is Block and again is not base
    assert [id(p) for p in again.parameters()] == [id(p) for p in twin.parameters()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in base.parameters()}
    assert again.fc1 is twin.fc1 and again.shift is twin.shift
    assert torch.equal(parent(X), base(X))
    with torch.no_grad():
        twin.scale.mul_(2)
        twin.fc1.weight.zero_()
    assert torch.equal(parent(X), again(X)) and not torch.equal(parent(X), base(X))
    parent.train()
    assert again.training and not base.training


@drop_ins
def test_moving_and_casting_reach_the_original(make, base):
    new = make(base)
    Parent(new).double()
    assert all(t.dtype == torch.float64 for t in (*base.parameters(), *base.buffers()))
    assert [id(p) for p in new.parameters()] == [id(p) for p in base.parameters()]
    assert new(X.double()).dtype == torch.float64
    new.load_state_dict({name: torch.zeros_like(t) for name, t in base.state_dict().items()})
    assert not base.fc1.weight.any()
    new.requires_grad_(False)
    assert not any(p.requires_grad for p in base.parameters())


def test_pass_through_returns_its_input(base):
    new = PassThrough.from_module(base)
    assert isinstance(new, Block) and new(X) is X
    assert list(new.state_dict()) == list(base.state_dict())


class Numbers(Tables):
    def __init__(self):
        super().__init__()
        self.table("floats", torch.rand(3))
        self.table("ids", torch.arange(3))
        self.table("none", None)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16), nn.Module.float])
def test_tables_keep_their_dtype(cast):
    parent = Parent(Numbers())
    floats = parent.child.floats
    cast(parent)
    assert parent.child.floats is floats and floats.dtype == torch.float32
    assert parent.child.ids.dtype == torch.int64 and parent.child.none is None


def test_tables_follow_the_device_and_stay_out_of_the_state_dict():
    parent = Parent(Numbers())
    assert parent.state_dict() == {}
    parent.to("meta", torch.float16)
    assert parent.child.floats.device.type == parent.child.ids.device.type == "meta"
    assert parent.child.floats.dtype == torch.float32 and parent.child.none is None
    assert {name for name, _ in parent.named_buffers()} == {"child.floats", "child.ids"}
