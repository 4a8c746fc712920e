"""An adopted module stays the object that it is, whatever is done to it, and can be released."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from configs import every_token
from torch import nn

from unike_kernels.errors import PatchError
from unike_kernels.nn import DropIn, MemoryAttention, ModelContext, Pass, PatchedFFN, release
from unike_kernels.nn._drop_in import Record, Tables, adopt, class_forward


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
    "attention": lambda base: MemoryAttention.from_module(base, every_token()),
}
drop_ins = pytest.mark.parametrize("make", DROP_INS.values(), ids=DROP_INS)
KINDS = ("named_parameters", "named_buffers", "named_children", "named_modules")
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


def contents(module):
    """What a module consists of, by identity."""
    return {name: id(value) for name, value in vars(module).items()}


@drop_ins
def test_the_module_stays_the_object_with_everything_it_has(make, base):
    wanted, state = base(X), list(base.state_dict())
    named = {kind: [(n, id(v)) for n, v in getattr(base, kind)()] for kind in KINDS}
    new = make(base)
    assert new is base and isinstance(new, Block) and isinstance(new, DropIn)
    assert type(new) is type(make(Block())) and type(new).__name__.endswith("Block")
    assert {kind: [(n, id(v)) for n, v in getattr(base, kind)()] for kind in KINDS} == named
    assert list(new.state_dict()) == state
    assert torch.equal(new(X), wanted)


@drop_ins
def test_release_undoes_it(make, base):
    before, wanted = contents(base), base(X)
    make(base)
    release(base)
    assert type(base) is Block and contents(base) == before and torch.equal(base(X), wanted)
    release(base)  # one that is not adopted
    assert type(base) is Block


@drop_ins
def test_no_name_of_the_module_is_hidden(make):
    """But for from_module, which is how it is made."""
    names = {n for cls in (MemoryAttention, PatchedFFN, DropIn) for n in dir(cls)} - set(dir(nn.Module))
    assert {n for n in names if not n.startswith("_unike")} == {"from_module"}
    block = Block()
    for name in ("activation", "config", "context", "dense", "edits", "layer", "memory", "project", "residual"):
        setattr(block, name, nn.Identity())
    before = set(vars(block))
    make(block)
    assert all(isinstance(getattr(block, name), nn.Identity) for name in block._modules if hasattr(nn.Identity, name))
    assert set(vars(block)) - before == {"_unike_record"} and block.config is block._modules["config"]


@drop_ins
def test_hooks_run_around_all_of_it_once(make, base):
    """Whether they were there before or came later; what they return is what counts."""
    ran = []

    def register():
        base.register_forward_pre_hook(lambda *_: ran.append("pre"))
        base.register_forward_pre_hook(lambda *_, **__: ran.append("pre kwargs"), with_kwargs=True)
        base.register_forward_hook(lambda *_: ran.append("post"))
        base.register_forward_hook(lambda m, a, k, out: ran.append("post kwargs"), with_kwargs=True)
        base.register_forward_hook(lambda *_: ran.append("always"), always_call=True)
        base.register_full_backward_pre_hook(lambda *_: ran.append("backward pre"))
        base.register_full_backward_hook(lambda *_: ran.append("backward"))

    register()
    new = make(base)
    register()
    new(X.clone().requires_grad_()).sum().backward()
    expected = ["pre", "pre kwargs", "post", "post kwargs", "always", "backward pre", "backward"]
    assert sorted(ran) == sorted(2 * expected)
    new.register_forward_hook(lambda m, args, out: out + 1)
    new.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    assert torch.equal(new(X), class_forward(new)(2 * X) + 1)


# --- forwards that are put on the instance ---------------------------------------------------------------------------


class Counting(Record):
    """Adds 100 to what the module returns."""

    def __init__(self):
        self.context = ModelContext()

    def run(self, module, base, args, kwargs):
        return base(*args, **kwargs) + 100


def counting(base):
    adopt(base, DropIn, Counting())
    return base


def plus_one(forward):
    return lambda x: forward(x) + 1


def test_a_forward_of_the_instance_is_the_base(base):
    """Before and after, set or bound into the `__dict__`; it is what it is on a module that is not adopted."""
    plain = base(X)
    base.forward = plus_one(base.forward)  # takes the class's forward
    counting(base)
    assert torch.equal(base(X), plain + 1 + 100)
    base.__dict__["forward"] = (lambda self, x: self.shift * x).__get__(base)  # as Liger does
    assert torch.equal(base(X), base.shift * X + 100)
    base.forward = lambda x: 2 * x
    assert torch.equal(base(X), 2 * X + 100)
    del base.forward
    assert torch.equal(base(X), plain + 100)
    with pytest.raises(AttributeError, match="forward"):
        del base.forward


def test_a_wrapper_of_the_patched_forward_adds_nothing_twice(base):
    plain = base(X)
    counting(base)
    held = base.forward
    base.forward = plus_one(held)
    assert torch.equal(base(X), plain + 1 + 100)
    again, own = base.forward, vars(base)["forward"]
    base.forward = plus_one(again)
    assert torch.equal(base(X), plain + 1 + 1 + 100)
    base.forward = again  # as it is put back
    assert vars(base)["forward"] is own
    assert torch.equal(base(X), plain + 1 + 100)
    assert torch.equal(held(X), plain + 100)  # by itself it is what it was
    base.forward = held
    assert "forward" not in vars(base) and torch.equal(base(X), plain + 100)
    assert torch.equal(type(base).forward(base, X), plain + 100)


def test_a_wrapper_may_call_the_model_again(base):
    """Another pass that a wrapper begins is a whole one."""
    plain = base(X)
    context = counting(base)._unike_record.context
    held, found = base.forward, []

    def wrapper(x):
        if not found:
            found.append(None)
            with context.running(Pass(context.current)):
                found.append(base(x))
        return held(x) + 1

    base.forward = wrapper
    assert torch.equal(base(X), plain + 1 + 100)
    assert torch.equal(found[1], plain + 1 + 100)


def test_a_wrapper_that_outlives_it(base):
    plain = base(X)
    counting(base)
    held = base.forward
    base.forward = plus_one(held)
    release(base)
    assert torch.equal(base(X), plain + 1) and torch.equal(held(X), plain)
    counting(base)
    assert torch.equal(base(X), plain + 1 + 100)


def test_accelerates_hooks(base):
    accelerate = pytest.importorskip("accelerate.hooks")
    plain = base(X)

    class Double(accelerate.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    accelerate.add_hook_to_module(base, Double())
    counting(base)
    assert torch.equal(base(X), 2 * plain + 100)
    accelerate.remove_hook_from_module(base)
    assert torch.equal(base(X), plain + 100)
    accelerate.add_hook_to_module(base, Double())
    assert torch.equal(base(X), 2 * plain + 100)
    release(base)
    assert torch.equal(base(X), 2 * plain)
    accelerate.remove_hook_from_module(base)
    assert torch.equal(base(X), plain)


@pytest.mark.parametrize("whole", [False, True], ids=["forward", "module"])
def test_compiled_forwards(base, whole):
    plain = base(X)
    counting(base)
    base.forward = torch.compile(base.forward, backend="eager", fullgraph=True)
    called = torch.compile(base, backend="eager", fullgraph=True) if whole else base
    assert torch.equal(called(X), plain + 100)


def test_a_class_that_was_derived_from_ours(base):
    """As parametrizations do it. What others have added to it stays."""
    linear = nn.Linear(4, 4)
    counting(linear)
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Softplus())
    wanted = nn.functional.linear(X, linear.weight, linear.bias)
    assert isinstance(linear, DropIn) and torch.equal(linear(X), wanted + 100)
    release(linear)
    assert not isinstance(linear, DropIn) and torch.equal(linear(X), wanted)
    nn.utils.parametrize.remove_parametrizations(linear, "weight")
    assert type(linear) is nn.Linear and torch.equal(linear(X), wanted)


# --- copies ----------------------------------------------------------------------------------------------------------


def copies(module):
    return {"deepcopy": copy.deepcopy(module), "pickle": pickle.loads(pickle.dumps(module))}


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@drop_ins
def test_a_copy_shares_nothing_with_its_source(make, way, base):
    new = make(base)
    parent = copies(Parent(new))[way]
    twin = parent.child
    assert type(twin) is type(new) and twin is not new
    assert vars(twin)["_unike_record"] is not vars(new)["_unike_record"]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in base.parameters()}
    assert torch.equal(parent(X), base(X))
    with torch.no_grad():
        twin.scale.mul_(2)
        twin.fc1.weight.zero_()
    assert not torch.equal(parent(X), base(X))
    release(twin)
    assert type(twin) is Block and isinstance(base, DropIn)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_part_of_a_model_that_was_copied_alone_is_refused(way, base):
    """Nobody could select anything for it."""
    context = ModelContext(config=every_token())
    MemoryAttention.from_module(base, every_token(), context=context)
    twin = copies(base)[way]
    with pytest.raises(PatchError, match="was copied or pickled alone"):
        twin(X)
    release(twin)
    assert torch.equal(twin(X), base(X))


@drop_ins
def test_moving_and_casting(make, base):
    new = make(base)
    Parent(new).double()
    assert all(t.dtype == torch.float64 for t in (*base.parameters(), *base.buffers()))
    assert new(X.double()).dtype == torch.float64


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
