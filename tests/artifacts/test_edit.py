"""Edits as values and as files."""

import pytest
import torch

import unike_kernels as uk
from unike_kernels.artifacts.edit import fresh_layer


def layer(n=3, d=8, gated=False, dtype=torch.float32, **changes):
    tensors = {
        "keys": torch.randn(n, d, dtype=dtype),
        "key_bias": torch.randn(n, dtype=dtype),
        "values": torch.randn(n, d, dtype=dtype),
        "zeta": torch.randn(d, dtype=dtype),
        "beta": torch.tensor(0.1, dtype=dtype),
    }
    if gated:
        tensors |= {"up": torch.randn(n, d, dtype=dtype), "up_bias": torch.randn(n, dtype=dtype)}
    return uk.EditLayer(**{**tensors, **changes})


BASE = {"model_type": "opt", "hidden_size": 8, "layers": 4, "parameters": 2, "samples": {"w": [0.5] * 8}}


def make(layers, **changes):
    values = {"id": "e", "layers": layers, "activation": "relu", "config": uk.Config(), "base_model": BASE}
    return uk.Edit(**{**values, "memory_id": None, **changes})


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip(tmp_path, gated, dtype):
    edit = make(
        {1: layer(gated=gated, dtype=dtype), 11: layer(n=1, gated=gated, dtype=dtype)},
        id="Ärger/1",
        memory_id="m" * 32,
        config=uk.Config(k=3, alpha=0.5),
        notes={"prompt": "wörd"},
    )
    edit.save(tmp_path / "edit.safetensors")
    found = uk.Edit.load(str(tmp_path / "edit.safetensors"))
    assert {k: v for k, v in vars(found).items() if k != "layers"} == {
        k: v for k, v in vars(edit).items() if k != "layers"
    }
    assert list(found.layers) == [1, 11]
    for index, mine in edit.layers.items():
        theirs = found.layers[index].tensors()
        assert theirs.keys() == mine.tensors().keys()
        assert all(torch.equal(theirs[name], t) and theirs[name].dtype == dtype for name, t in mine.tensors().items())


@pytest.mark.parametrize(("gated", "floats"), [(False, 10 * (2 * 4096 + 1)), (True, 10 * (3 * 4096 + 2))])
def test_ten_neurons_in_four_layers_of_width_4096_are_a_megabyte(tmp_path, gated, floats):
    edit = make({i: layer(10, 4096, gated) for i in range(28, 32)})
    assert edit.nbytes == 4 * 4 * (floats + 4096 + 1)
    edit.save(tmp_path / "edit.safetensors")
    size = (tmp_path / "edit.safetensors").stat().st_size
    assert edit.nbytes < size < edit.nbytes + 5000
    assert round(size / 1e6, 1) == (2.0 if gated else 1.4)


def test_only_the_edits_own_part_of_a_larger_tensor_is_written(tmp_path):
    whole = torch.randn(100, 3, 8)
    make({0: layer(keys=whole[7], values=whole[8])}).save(tmp_path / "e")
    assert (tmp_path / "e").stat().st_size < 3000
    assert torch.equal(uk.Edit.load(tmp_path / "e").layers[0].values, whole[8])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_not_saved(tmp_path, bad):
    broken = layer(values=torch.full((3, 8), bad))
    with pytest.raises(uk.ArtifactError, match=r"edit 'e': layers\.2\.values holds NaN or infinity"):
        make({0: layer(), 2: broken}).save(tmp_path / "e")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": torch.zeros(3)}, ValueError, r"EditLayer.keys: expected shape \[n, d\], got \[3\]"),
        ({"key_bias": torch.zeros(2)}, ValueError, r"EditLayer.key_bias: expected shape \[3\], got \[2\]"),
        ({"values": torch.zeros(3, 7)}, ValueError, r"EditLayer.values: expected shape \[3, 8\], got \[3, 7\]"),
        ({"zeta": torch.zeros(1, 8)}, ValueError, r"EditLayer.zeta: expected shape \[8\]"),
        ({"beta": torch.zeros(1)}, ValueError, r"EditLayer.beta: expected shape \[\], got \[1\]"),
        ({"up": torch.zeros(3, 8)}, ValueError, "gated neurons need both up and up_bias"),
        ({"up_bias": torch.zeros(3)}, ValueError, "gated neurons need both up and up_bias"),
        ({"up": torch.zeros(3, 7), "up_bias": torch.zeros(3)}, ValueError, r"EditLayer.up: expected shape \[3, 8\]"),
        ({"zeta": torch.zeros(8).double()}, TypeError, "EditLayer.zeta: expected torch.float32 as keys, got torch.fl"),
        ({"keys": torch.zeros(3, 8).long()}, TypeError, "EditLayer.key_bias: expected torch.int64 as keys"),
    ],
)
def test_a_layer_whose_tensors_do_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        layer(**changes)


def test_a_layer_of_integers():
    tensors = {name: t.long() for name, t in layer().tensors().items()}
    with pytest.raises(TypeError, match=r"got torch.int64"):
        uk.EditLayer(**tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "Edit.id: expected a non-empty string, got ''"),
        ({"id": 3}, "Edit.id: expected a non-empty string, got 3"),
        ({"layers": {}}, "Edit.layers: expected at least one layer"),
        ({"activation": "tanh"}, "Edit.activation: expected one of relu"),
        ({"layers": {0: layer(), 1: layer(d=9)}}, r"Edit.layers: expected one hidden size, got \[8, 9\]"),
    ],
)
def test_an_edit_whose_parts_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**{"layers": {0: layer()}, **changes})


def test_detached_is_a_copy_without_history():
    keys = torch.randn(3, 8, requires_grad=True)
    copy = layer(keys=keys * 2).detached()
    assert not copy.keys.requires_grad
    same = layer(keys=keys.detach())
    assert same.detached().keys.data_ptr() != same.keys.data_ptr()


def test_fresh_neurons_do_nothing_and_can_learn():
    for gated in (False, True):
        new = fresh_layer(torch.randn(3, 8), torch.randn(3), torch.randn(8), gated=gated)
        assert not new.values.any()
        assert new.beta == 0
        assert (new.up is not None) == gated
        if gated:  # the factor q 0 + 1
            assert not new.up.any()
            assert new.up_bias.eq(1).all()
