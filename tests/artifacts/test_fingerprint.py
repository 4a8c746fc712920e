"""The fingerprint: the same model, a cast one, another one; and what cannot be read."""

import json

import pytest
import torch

from unike_kernels.artifacts.fingerprint import _sample, agree, compare, fingerprint, validate


@pytest.mark.parametrize("kind", ["opt", "llama", "blip2-opt", "blip2-llama"])
def test_same_model_other_weights_and_a_cast(make_model, kind):
    made_for = json.loads(json.dumps(fingerprint(make_model(kind))))
    assert compare(validate(made_for), make_model(kind)) == (None, None)
    error, _ = compare(made_for, make_model(kind, seed=1))
    assert "other weights" in error
    for dtype in (torch.bfloat16, torch.float16):
        error, warning = compare(made_for, make_model(kind, dtype=dtype))
        assert error is None
        assert "cast or quantised" in warning
    error, warning = compare(fingerprint(make_model(kind, dtype=torch.bfloat16)), make_model(kind))
    assert error is None
    assert "cast or quantised" in warning


def test_it_is_small(make_model):
    made = fingerprint(make_model("opt"))
    assert 6 <= len(made["samples"]) <= 24
    assert {len(values) for values in made["samples"].values()} == {8}
    assert (made["model_type"], made["hidden_size"], made["layers"]) == ("opt", 64, 6)


def test_other_model_type_and_size(make_model):
    made_for = fingerprint(make_model("opt"))
    assert compare(made_for, make_model("llama"))[0] == "it was made for model_type 'opt', this model has 'llama'"
    assert "hidden_size 32, this model has 64" in compare(made_for | {"hidden_size": 32}, make_model("opt"))[0]
    assert "layers 5, this model has 6" in compare(made_for | {"layers": 5}, make_model("opt"))[0]


def test_a_sampled_weight_that_moved_a_little_and_a_lot(make_model):
    model = make_model("opt")
    made_for = fingerprint(model)
    name, values = next(iter(made_for["samples"].items()))
    parameter = dict(model.named_parameters())[name].data.view(-1)
    size = torch.tensor(values).norm() / 8**0.5
    parameter[0] += 0.01 * size
    error, warning = compare(made_for, model)
    assert error is None
    assert "0.01" in warning
    parameter[0] += 0.02 * size
    assert "differs by 0.03" in compare(made_for, model)[0]


def test_weights_that_are_not_in_memory(make_model):
    """Offloaded parameters are on meta; quantised ones are integers. Neither crashes, neither is compared."""
    made_for = fingerprint(make_model("opt"))
    away = make_model("opt").to("meta")
    assert fingerprint(away)["samples"] == {}
    assert compare(made_for, away) == (
        None,
        "no weight could be compared with the base model's (quantised, offloaded or renamed)",
    )
    quantised = make_model("opt")
    for module in quantised.modules():
        if isinstance(module, torch.nn.Linear) and module is not quantised.lm_head:
            module.weight = torch.nn.Parameter(module.weight.data.mul(100).to(torch.int8), requires_grad=False)
    assert 0 < len(fingerprint(quantised)["samples"]) < len(made_for["samples"])
    error, warning = compare(made_for, quantised)
    assert error is None
    assert "cast or quantised" in warning


def test_a_module_without_config(make_model):
    made = fingerprint(torch.nn.Linear(2, 3))
    assert (made["model_type"], made["hidden_size"], made["parameters"]) == ("Linear", None, 2)
    assert "model_type 'Linear'" in compare(made, make_model("opt"))[0]


@pytest.mark.parametrize(
    "broken",
    [
        None,
        {},
        {"extra": 1},
        {"samples": None},
        {"samples": {"w": [1.0]}},
        {"samples": {"w": ["1"] * 8}},
        {"samples": {"w": [float("nan")] * 8}},
    ],
)
def test_validate_refuses_what_is_no_fingerprint(make_model, broken):
    value = {**fingerprint(make_model("opt")), **broken} if broken else broken
    with pytest.raises(ValueError, match="base_model: expected"):
        validate(value)


@pytest.mark.parametrize("kind", ["opt", "llama", "blip2-opt"])
def test_a_token_that_is_added_makes_no_other_model(make_model, kind):
    """With the output tied or not; nor does it where an older file has samples of the embedding, too."""
    for tied in (False, True):
        model = make_model(kind)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = tied
        model.tie_weights()
        made_for = fingerprint(model)
        older = dict(list(model.named_parameters())[:: max(1, len(list(model.parameters())) // 12)])
        older = made_for | {"samples": {name: _sample(p) for name, p in older.items()}}
        assert any("embed" in name or "query_tokens" in name for name in older["samples"])
        model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 1)
        assert compare(made_for, model) == (None, None)
        assert compare(older, model) == (None, None)
    other = make_model(kind, seed=1)
    assert "other weights" in compare(older, other)[0]


def test_memories_of_both_samplings_can_be_joined(make_model):
    one = fingerprint(make_model("opt"))
    few = one | {"samples": dict(list(one["samples"].items())[::2])}
    assert agree(one, few)
    other = fingerprint(make_model("opt", seed=1))
    assert not agree(few, other)
    assert not agree(one, one | {"layers": 7})
