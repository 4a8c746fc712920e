"""The selections: what they hold, without making any data."""

import pytest
from unike_bench import suite


@pytest.mark.parametrize("select", suite.SELECTIONS)
def test_names_tell_cases_apart_and_the_first_system_is_ours(select):
    cases = suite.cases(select, growth=True)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        (first, *_), (role, *_) = case.systems, (s.role for s in case.systems.values())
        assert first.startswith("unike")
        assert role == "ours"


def test_quick_is_part_of_full():
    names = {case.name for case in suite.cases("full")}
    assert {case.name for case in suite.cases("quick")} <= names


def test_quick_measures_what_matters():
    names = {case.name for case in suite.cases("quick")}
    wanted = {f"retrieval-N15000-d4096-B{b}-k40-isotropic" for b in (1, 8, 64, 512)}
    wanted |= {f"attention-{kind}-N15000-d4096-T{t}-k40" for kind in ("latent", "memory") for t in (1, 128)}
    wanted |= {f"ffn-d4096-T{t}-edits1" for t in (1, 128)} | {"ffn-d4096-T64-edits64"}
    assert wanted <= names


def test_only_and_growth():
    assert {case.op for case in suite.cases(only="ffn")} == {"ffn"}
    assert {case.op for case in suite.cases(only="ffn", growth=True)} == {"ffn", "growth"}


def test_unknown_selections():
    with pytest.raises(ValueError, match="select: expected one of quick, full; got 'all'"):
        suite.cases("all")
    with pytest.raises(ValueError, match="only: expected one of retrieval, attention, ffn, decode; got 'gpu'"):
        suite.cases(only="gpu")
