"""What people do to a model before and after they patch it, for models of several structures.

What it then computes is compared with a model on which only that was done, and plain hooks for the edit and the memory;
and after `unpatch` it is that model, bit for bit. Or it is an error, which says what to do.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from backbones.zoo import ZOO, logits, model_of, places
from configs import every_token
from hooks_reference import hooked
from torch import nn
from torch.nn.utils import parametrize

import unike_kernels as uk
from unike_kernels.nn import DropIn

FAMILIES = {"llama": "llama", "opt": "opt", "gpt2": "gpt2", "llava": "llava", "experts": "mixtral"}
DENSE = ("llama", "opt", "gpt2", "llava")
LAYERS = (2, 3)
IDS = torch.tensor([[7, 8, 9, 10], [12, 13, 14, 15]])


@pytest.fixture(scope="module")
def made(make_edit, make_memory):
    """family -> a model, an edit and a memory; not to be changed."""
    known = {}

    def make(family):
        if family not in known:
            model = model_of(ZOO[FAMILIES[family]], torch.float32)
            memory = make_memory(model, every_token(k=5, values="pre"), entries=20, layers=LAYERS)
            edits = [make_edit(model, "a", memory, layers=LAYERS), make_edit(model, "b", memory, layers=(3,), seed=5)]
            known[family] = model, edits, memory
        return known[family]

    return make


# --- where things are in these models --------------------------------------------------------------------------------


def layers_of(model, family):
    return uk.backbones.unwrap(model).get_submodule(ZOO[FAMILIES[family]].layers)


def last(model, family):
    return layers_of(model, family)[3]


def attention_of(model, family):
    return last(model, family).get_submodule(ZOO[FAMILIES[family]].attention)


def ffn_of(model, family):
    """The FFN, or the last part of one that stands inline."""
    return last(model, family).get_submodule(ZOO[FAMILIES[family]].ffn[1])


OUTWARD = {"llama": "mlp.down_proj", "llava": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2"}


# --- what is done ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Something that is done to a model.

    Attributes:
        after: (model, family) -> the model that is used from then on; once it is patched.
        before: the same, before it is patched.
        refused: families in which what was patched is not reached any more, or "all"; and what the error says of it.
        families: in which it can be done.
        tolerance: of the largest logit.
        rows: whether a row does not depend on the others.
        slow: whether it takes seconds.
    """

    after: Callable = lambda model, family: model
    before: Callable = lambda model, family: model
    refused: tuple[str, ...] = ()
    message: str = ""
    families: tuple[str, ...] = tuple(FAMILIES)
    tolerance: float = 1e-4
    rows: bool = True
    slow: bool = False


CASES: dict[str, Case] = {}


def peft_config(kind="Lora", **more):
    peft = pytest.importorskip("peft")
    usual = dict(target_modules="all-linear")
    if kind == "Lora":
        usual |= dict(r=4, init_lora_weights=False)
    return getattr(peft, f"{kind}Config")(**usual | more)


def own_adapter(model, family):
    try:
        model.add_adapter(peft_config())
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))  # transformers 5.24 asks for one that is not published yet


def adapted(model, family=None, **more):
    peft = pytest.importorskip("peft")
    if family == "experts":  # whose weights PEFT renames
        more["target_modules"] = ["q_proj", "o_proj"]
    return peft.get_peft_model(model, peft_config(**more)).eval()


def then(*steps):
    def done(model, family):
        for step in steps:
            found = step(model, family)
            model = model if found is None else found
        return model

    return done


def disable(model, family):
    model.base_model.disable_adapter_layers()


def another_adapter(model, family):
    model.add_adapter("other", peft_config(r=2, target_modules=r".*(q_proj|k_proj|c_attn|fc1|gate_proj)"))
    model.set_adapter("other")


def trained_adapter(model, family):
    """Adapters as they are after some steps."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.05 * torch.randn(p.shape))


CASES |= {
    "nothing": Case(),
    "LoRA": Case(adapted),
    "LoRA, trained": Case(then(adapted, trained_adapter)),
    "LoRA, disabled": Case(then(adapted, disable)),
    "LoRA, unloaded": Case(then(adapted, lambda m, f: m.unload())),
    "LoRA, merged": Case(then(adapted, lambda m, f: m.merge_adapter())),
    "LoRA, merged and unloaded": Case(then(adapted, lambda m, f: m.merge_and_unload())),
    "LoRA before": Case(before=adapted),
    "LoRA before, trained": Case(before=adapted, after=trained_adapter),
    "LoRA before, disabled": Case(before=adapted, after=disable),
    "LoRA before, another": Case(before=adapted, after=another_adapter, families=DENSE),
    "LoRA before, deleted": Case(
        before=then(adapted, another_adapter), after=lambda m, f: m.delete_adapter("default"), families=DENSE
    ),
    "LoRA before, merged": Case(before=adapted, after=lambda m, f: m.merge_adapter()),
    "LoRA before, unloaded": Case(
        before=adapted, after=lambda m, f: m.unload(), refused=("opt",), message=r"fc1 \(Linear\) was patched"
    ),
    "LoRA before, merged and unloaded": Case(
        before=adapted, after=lambda m, f: m.merge_and_unload(), refused=("opt",), message="there is now Linear"
    ),
    "DoRA": Case(
        lambda m, f: adapted(m, use_dora=True), refused=("opt",), families=("llama", "opt"), message="is now Linear"
    ),
    "IA3": Case(
        lambda m, f: adapted(m, kind="IA3", feedforward_modules=r".*(down_proj|fc2)", init_ia3_weights=False),
        refused=("opt",), families=("llama", "opt"), message="which the edits or the memory do not reach",
    ),
    "transformers' add_adapter": Case(own_adapter, families=("llama", "opt", "llava")),
    "modules to save": Case(
        lambda m, f: adapted(m, target_modules=[OUTWARD[f]], modules_to_save=["self_attn"]),
        refused=("all",), families=("llama",), message="there is now ModulesToSaveWrapper",
    ),
    "modules to save before": Case(
        before=lambda m, f: adapted(m, target_modules=["q_proj"], modules_to_save=["mlp"]), families=("llama",),
    ),
}  # fmt: skip


def halved_forward(model, family):
    """As Liger binds its own: into the `__dict__`, with other arithmetic."""
    module = ffn_of(model, family)
    own = next(cls for cls in type(module).__mro__ if not issubclass(cls, DropIn) and "forward" in vars(cls))

    def forward(self, *args):
        out = own.forward(self, *args)
        return (0.5 * out[0], *out[1:]) if isinstance(out, tuple) else 0.5 * out

    module.__dict__["forward"] = forward.__get__(module, type(module))


def wrapped_forward(model, family):
    """Around whatever `forward` is."""
    for module in (attention_of(model, family), ffn_of(model, family)):
        inner = module.forward
        module.forward = lambda *args, inner=inner, **kwargs: inner(*args, **kwargs)


def recorded_forward(model, family):
    """As recorders do: set for a pass, and put back."""
    held = [(m, m.forward) for m in (attention_of(model, family), ffn_of(model, family))]
    wrapped_forward(model, family)
    logits(model, IDS)
    for module, inner in held:
        module.forward = inner


def accelerated(model, family):
    hooks = pytest.importorskip("accelerate.hooks")

    class Louder(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 1.5

    part = last(model, family).get_submodule(OUTWARD.get(family, "mlp.experts"))
    hooks.add_hook_to_module(part, Louder())
    hooks.add_hook_to_module(attention_of(model, family), hooks.ModelHook())


def unaccelerated(model, family):
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)


def compiled_forward(model, family):
    for module in (attention_of(model, family), ffn_of(model, family)):
        module.forward = torch.compile(module.forward, backend="eager")


CASES |= {
    "a forward that is bound": Case(halved_forward, families=DENSE),
    "a forward that is bound before": Case(before=halved_forward, families=DENSE),
    "a forward that is wrapped": Case(wrapped_forward),
    "a forward that is wrapped twice": Case(then(wrapped_forward, wrapped_forward)),
    "a forward that is wrapped before and after": Case(before=wrapped_forward, after=wrapped_forward),
    "a forward that is put back": Case(recorded_forward),
    "a bound one, recorded": Case(
        then(halved_forward, recorded_forward), families=DENSE
    ),
    "a forward that is compiled": Case(compiled_forward, families=("llama", "opt"), slow=True),
    "accelerate's hooks": Case(accelerated),
    "accelerate's hooks before": Case(before=accelerated),
    "accelerate's hooks, removed": Case(then(accelerated, unaccelerated)),
    "accelerate's hooks before, removed after": Case(before=accelerated, after=unaccelerated),
}  # fmt: skip


def replaced_child(model, family):
    holder, name = {
        "opt": (last(model, family), "activation_fn"), "experts": (ffn_of(model, family), "gate"),
    }.get(family, (ffn_of(model, family), OUTWARD.get(family, "").rpartition(".")[2]))  # fmt: skip
    new = nn.GELU() if family == "opt" else copy.deepcopy(getattr(holder, name))
    with torch.no_grad():
        for p in new.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    setattr(holder, name, new)


def replaced_ffn(model, family):
    name = ZOO[FAMILIES[family]].ffn[1]
    torch.manual_seed(1)
    new = copy.deepcopy(ffn_of(model_of(ZOO[FAMILIES[family]]).float(), family))
    setattr(last(model, family), name, new)


def replaced_attention(model, family):
    name = ZOO[FAMILIES[family]].attention
    setattr(last(model, family), name, copy.deepcopy(attention_of(model_of(ZOO[FAMILIES[family]]).float(), family)))


def replaced_layer(model, family):
    layers_of(model, family)[3] = copy.deepcopy(last(model_of(ZOO[FAMILIES[family]]).float(), family))


class Around(nn.Module):
    """A wrapper of a layer, as checkpointing and sharding put it there."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def wrapped_layer(model, family):
    layers_of(model, family)[3] = Around(last(model, family))


def moved(model, family):
    one, other = layers_of(model, family)[2], layers_of(model, family)[3]
    name = ZOO[FAMILIES[family]].ffn[1]
    first, second = getattr(one, name), getattr(other, name)
    setattr(one, name, second)
    setattr(other, name, first)


def other_scaling(model, family):
    attention = attention_of(model, family)
    if family == "gpt2":
        attention.scale_attn_weights = False
        attention.scaling = 1.0
    attention.scaling = 0.9


class Softened(nn.Module):
    def forward(self, weight):
        return 0.9 * weight


def parametrized(model, family):
    part = last(model, family).get_submodule(OUTWARD[family])
    parametrize.register_parametrization(part, "weight", Softened())


def unparametrized(model, family):
    parametrize.remove_parametrizations(last(model, family).get_submodule(OUTWARD[family]), "weight")


def quantized(model, family):
    """By the exact class, which a part of an inline FFN does not have while it is patched: it stays as it is."""
    kept = [(layer, layer.fc1, layer.fc2) for layer in layers_of(model, family)[2:]] if family == "opt" else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    for layer, *parts in kept:
        layer.fc1, layer.fc2 = parts


def hooks_inside(model, family):
    """In the middle of an FFN, and one around it that only adds something."""
    middle = last(model, family).fc1 if family == "opt" else next(ffn_of(model, family).children())
    middle.register_forward_hook(lambda m, args, out: (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out)
    ffn_of(model, family).register_forward_hook(
        lambda m, args, out: (out[0] + 0.1, *out[1:]) if isinstance(out, tuple) else out + 0.1
    )


CASES |= {
    "a new child": Case(replaced_child),
    "a new FFN": Case(replaced_ffn, refused=("all",), message="layer 3: where its .* was patched, there is now"),
    "a new attention": Case(
        replaced_attention, refused=("all",), message="layer 3: where its .* was patched, there is now"
    ),
    "a new layer": Case(replaced_layer, refused=("all",), message="is not in the model any more"),
    "fewer layers": Case(
        lambda m, f: setattr(m.model, "layers", m.model.layers[:3]), refused=("all",), families=("llama",),
        message="is not in the model any more",
    ),
    "a wrapped layer": Case(wrapped_layer, families=("llama", "opt")),
    "FFNs that change places": Case(moved, refused=("all",), message="layer 2: where its .* was patched"),
    "another scaling": Case(other_scaling, families=("llama", "opt", "llava", "experts")),
    "parametrized": Case(parametrized, families=DENSE),
    "parametrized, and not any more": Case(
        then(parametrized, unparametrized), families=DENSE
    ),
    "parametrized before": Case(before=parametrized, families=DENSE),
    "quantized": Case(quantized, families=("llama", "opt", "llava", "experts"), tolerance=2e-2, rows=False),
    "hooks": Case(hooks_inside),
    "hooks before": Case(before=hooks_inside),
}  # fmt: skip


def loaded(model, family):
    model.load_state_dict({name: 0.9 * t for name, t in model.state_dict().items()})


def casted(model, family):
    model.double()


def toggled(model, family):
    model.requires_grad_(False)
    model.train()
    model.eval()
    model.requires_grad_(True)


def checkpointed(model, family):
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.enable_grad():
        logits(model, IDS).sum().backward()
    model.zero_grad()


CASES |= {
    "DataParallel": Case(lambda m, f: nn.DataParallel(m), families=("llama", "opt")),
    "torch.compile": Case(
        lambda m, f: torch.compile(m, backend="eager"), families=("llama", "opt"), slow=True
    ),
    "PEFT around torch.compile's": Case(
        then(adapted, lambda m, f: torch.compile(m, backend="eager")), families=("llama",), slow=True
    ),
    "deepcopy": Case(lambda m, f: copy.deepcopy(m)),
    "deepcopy with LoRA": Case(then(adapted, lambda m, f: copy.deepcopy(m)), families=("llama", "opt")),
    "pickle": Case(lambda m, f: pickle.loads(pickle.dumps(m))),
    "load_state_dict": Case(loaded),
    "double": Case(casted, families=DENSE),
    "modes and requires_grad": Case(toggled),
    "gradient checkpointing": Case(checkpointed),
}  # fmt: skip


# --- what it then computes -------------------------------------------------------------------------------------------

PARAMETERS = [
    pytest.param(
        family, name, id=f"{family}-{name}",
        marks=[pytest.mark.slow] if case.slow or family not in ("llama", "opt") else [],
    )
    for name, case in CASES.items()
    for family in case.families
]  # fmt: skip


@torch.no_grad()
def outputs(model):
    return model(input_ids=IDS, use_cache=False).logits


def run(step, model, family):
    torch.manual_seed(0)
    found = step(model, family)
    return model if found is None else found


def remains(model):
    """What is left of the patch."""
    return [n for n, m in model.named_modules() if isinstance(m, DropIn) or any("unike" in key for key in vars(m))]


@pytest.mark.parametrize(("family", "name"), PARAMETERS)
def test_done_to_a_patched_model(made, family, name):
    pristine, edits, memory = made(family)
    case = CASES[name]
    # A model on which only this is done.
    plain = run(case.before, copy.deepcopy(pristine), family)
    plain = run(case.after, plain, family)
    untouched = outputs(plain)
    # The same with edits and a memory.
    model = run(case.before, copy.deepcopy(pristine), family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        uk.patch(model, edits, memory, override=True)
    model = run(case.after, model, family)
    refused = {"all", family} & set(case.refused)
    if refused:
        with pytest.raises(uk.PatchError, match=case.message):
            outputs(model)
        with pytest.raises(uk.PatchError, match=r"call unike_kernels.unpatch\(model\), then change the model"):
            uk.rows(model, [[], []]).__enter__()
    else:
        found = outputs(model)
        decoder = uk.backbones.unwrap(plain)
        dtype = next(decoder.parameters()).dtype
        with hooked(
            places(decoder, ZOO[FAMILIES[family]]), torch.ones_like(IDS, dtype=torch.bool),
            edits=[[as_dtype(e, dtype) for e in edits]] * 2, memory=as_dtype(memory, dtype), config=memory.config,
        ):  # fmt: skip
            wanted = outputs(uk.backbones.unwrap(plain))
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=case.tolerance * scale)
        assert float((wanted - untouched).abs().max()) > 10 * case.tolerance * scale  # it is not blind
        with uk.rows(model, [["a"], []], memory=[True, False]):
            rows = outputs(model)
        if case.rows and family != "experts":
            assert torch.equal(rows[1], untouched[1])
        assert not torch.equal(rows[0], found[0]) and not torch.equal(rows[0], untouched[0])
    patched = [place.module for place in uk.patching.session.state_of(model).places.each]
    uk.unpatch(model)
    assert not uk.is_patched(model) and remains(model) == []
    assert not any(isinstance(module, DropIn) for module in patched)  # wherever they are now
    assert torch.equal(outputs(model), untouched)


def as_dtype(artifact, dtype):
    """An edit or a memory with tensors of this dtype."""

    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype)
        if isinstance(value, uk.ops.SemanticEncoder):
            return uk.ops.SemanticEncoder(*(t.to(dtype) for t in value))
        return value

    layers = {
        i: type(layer)(**{name: cast(value) for name, value in vars(layer).items()})
        for i, layer in artifact.layers.items()
    }
    return replace(artifact, layers=layers)
