"""Config: what it accepts, what it compares, and that it survives a round trip through JSON."""

import dataclasses
import json

import numpy as np
import pytest

import unike_kernels as uk


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 0),
        ("k", 1.0),
        ("k", True),
        ("retrieval", "batch"),
        ("tokens", "image"),
        ("values", None),
        ("scale", 0),
        ("scale", float("inf")),
        ("scale", "dot"),
        ("scale", True),
        ("tau", 0),
        ("tau", None),
        ("tau", float("nan")),
        ("alpha", "first"),
        ("alpha", 1.01),
        ("alpha", -0.01),
        ("alpha", True),
        ("alpha", float("nan")),
        ("convention", "eq8"),
        ("norm", "l2"),
        ("neurons", "fused"),
        ("w_zeta", "frozen"),
        ("beta", float("nan")),
        ("beta", "0.1"),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"Config.{name}: expected .*got {value!r}"):
        uk.Config(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"k": 1, "alpha": 0, "scale": 2},
        {"scale": "cosine", "tau": 0.1},
        {"alpha": 1.0, "beta": -0.5, "tokens": "text"},
        {"values": "projected"},
    ],
)
def test_round_trip_through_json(values):
    config = uk.Config(**values)
    assert uk.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_an_older_version_wrote_has_the_defaults_of_later_fields():
    config = uk.Config(k=3, alpha=0.5)
    older = {name: value for name, value in config.to_dict().items() if name not in ("tau", "scope")}
    assert uk.Config.from_dict(older) == config
    assert uk.Config.from_dict({**config.to_dict(), "tau": 0.2}).tau == 0.2


@pytest.mark.parametrize("change", [{"extra": 1}, {"k": 0}, None, "k"])
def test_from_dict_refuses_what_is_no_config(change):
    values = uk.Config().to_dict()
    if change == "k":
        del values["k"]
    values = None if change is None else values | (change if isinstance(change, dict) else {})
    with pytest.raises(ValueError, match="Config"):
        uk.Config.from_dict(values)


def test_differences_are_those_that_inference_sees():
    base = uk.Config(k=7)
    assert base.differences(uk.Config(k=7, neurons="gated", w_zeta="edit", beta=0.7)) == []
    other = {"retrieval": "sequence", "tokens": "text", "values": "projected", "scale": 0.5, "alpha": 0.5}
    other |= {"convention": "eq7", "norm": "none", "k": 3, "tau": 0.1}
    for name, value in other.items():
        mine = getattr(base, name)
        assert base.differences(dataclasses.replace(base, **{name: value})) == [f"{name}: {mine!r} != {value!r}"]


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({}, True),
        ({"tokens": "all"}, False),
        ({"tokens": "all", "alpha": 0.5}, False),
        ({"tokens": "all", "alpha": "last"}, True),
        ({"tokens": "all", "retrieval": "sequence"}, True),
        ({"tokens": "text", "scope": "memory"}, True),
    ],
)
def test_needs_prompt_ends(values, needed):
    assert uk.Config(**values).needs_prompt_ends is needed


def test_numbers_of_other_libraries():
    """They are as good, and are kept as Python's, which JSON can hold."""
    config = uk.Config(k=np.int64(3), scale=np.float32(0.5), alpha=np.float64(0.25), beta=np.int32(1))
    assert config == uk.Config(k=3, scale=0.5, alpha=0.25, beta=1)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    for wrong in (np.float64(3.0), np.bool_(True), "3"):
        with pytest.raises(ValueError, match=r"Config\.k: expected an integer of at least 1"):
            uk.Config(k=wrong)
    for name in ("scale", "tau", "alpha", "beta"):
        with pytest.raises(ValueError, match=f"Config.{name}: expected"):
            uk.Config(**{name: 10**400})
