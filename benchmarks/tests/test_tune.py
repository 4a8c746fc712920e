"""Tuning with known times: the best is found, what fails or is wrong is not chosen, and kernels take what was found."""

from __future__ import annotations

import json
import types
from typing import NamedTuple

import pytest
import torch
from unike_bench import tune
from unike_bench.harness.case import Run

from unike_kernels.cli import main
from unike_kernels.ops import _tiles


class Sizes(NamedTuple):
    width: int = 32
    stages: int = 2


@pytest.fixture
def kernel(monkeypatch):
    """Sizes -> seconds of the kernel; where there are none it fails."""
    times: dict[Sizes, float] = {}
    module = types.SimpleNamespace(Tiles=Sizes, CANDIDATES={"width": (16, 32, 64), "stages": (1, 2, 3)})
    monkeypatch.setattr(tune.importlib, "import_module", lambda name: module)

    def call() -> Sizes:
        sizes = _tiles.tile_sizes("op", 1, torch.bfloat16, Sizes(), module.CANDIDATES)
        if sizes not in times:
            raise RuntimeError("out of resources")
        return sizes

    def check(found: Sizes) -> None:
        assert times[found] > 0, "wrong"

    timed = lambda run: times[run.call()]  # noqa: E731
    tunable = tune.Tunable("op", "op.triton", lambda tokens, dtype: [Run(call, check), Run(call, check)], 1)
    return times, lambda: list(tune.tune([tunable], timed=timed))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIKE_CACHE", str(tmp_path))
    monkeypatch.setattr(_tiles, "device_name", lambda: "a GPU")
    _tiles.forget()
    yield tmp_path / "tiles.json"
    _tiles.forget()


def test_the_fastest_that_is_right(kernel):
    times, run = kernel
    times |= {Sizes(32, 2): 4.0, Sizes(64, 2): 2.0, Sizes(64, 1): -1.0, Sizes(64, 3): 1.0, Sizes(16, 3): 0.5}
    (found,) = run()
    assert (found.op, found.form) == ("op", "bfloat16, up to 1")
    assert (found.sizes, found.before) == (Sizes(64, 3), pytest.approx(4.0))
    assert found.after == pytest.approx(1.0)


def test_defaults_that_are_wrong_are_told(kernel):
    times, run = kernel
    times[Sizes()] = -1.0
    with pytest.raises(AssertionError, match="wrong"):
        run()


def test_each_form_is_tuned_by_itself():
    """Buckets of tokens and dtypes, of which a kernel may not take the largest."""
    asked = []

    def runs(tokens, dtype):
        asked.append((tokens, dtype))
        return [Run(lambda: None, lambda _: None)]

    tunables = [tune.Tunable("patched_ffn", "patched_ffn.triton_fused", runs, 64), tune.TUNABLES[1]]
    found = list(tune.tune(tunables[:1], [torch.bfloat16, torch.float32], timed=lambda run: 1.0))
    assert asked == [(t, dtype) for dtype in (torch.bfloat16, torch.float32) for t in (1, 8, 64)]
    assert [each.form for each in found] == [
        f"{dtype}, up to {t}" for dtype in ("bfloat16", "float32") for t in (1, 8, 64)
    ]
    forms = {t: _tiles.form(t, torch.bfloat16) for t in (1, 2, 8, 9, 64, 65, 512, 4096)}
    assert [forms[t].rsplit(" ", 1)[1] for t in forms] == ["1", "8", "8", "64", "64", "512", "512", "512"]


def test_what_was_found_is_merged_and_taken(cache):
    one, eight = "bfloat16, up to 1", "bfloat16, up to 8"
    old = {"old": {one: {"width": 8}}, "op": {eight: {"width": 16}}}
    cache.write_text(json.dumps({"another": {"op": {one: {"width": 16}}}, "a GPU": old}))
    merged = tune.merged([tune.Tuned("op", one, Sizes(64, 3), 2.0, 1.0)], "a GPU")
    assert merged == {
        "another": {"op": {one: {"width": 16}}},
        "a GPU": {"old": {one: {"width": 8}}, "op": {eight: {"width": 16}, one: {"width": 64, "stages": 3}}},
    }
    cache.write_text(json.dumps(merged))
    _tiles.forget()

    def taken(op, tokens, dtype=torch.bfloat16, **candidates):
        return _tiles.tile_sizes(op, tokens, dtype, Sizes(), candidates)

    assert taken("op", 1, width=(64,), stages=(3,)) == Sizes(64, 3)
    assert taken("op", 1, width=(16,), stages=(3,)) == Sizes(32, 3)  # not a candidate
    assert taken("op", 5, width=(16,), stages=(3,)) == Sizes(16, 2)
    assert taken("op", 64, width=(16,), stages=(3,)) == taken("op", 1, torch.float16, width=(64,)) == Sizes()
    assert taken("other", 1) == Sizes()


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[1]",
        '{"a GPU": {"op": {"width": 16}}}',
        '{"a GPU": {"op": {"f": {"width": "wide"}}}}',
        '{"a GPU": 3}',
    ],
)
def test_a_file_that_is_no_cache_is_left_out_with_a_warning(text, cache):
    cache.write_text(text)
    with pytest.warns(UserWarning, match=r"tiles\.json: not a cache of tile sizes"):
        assert _tiles.tile_sizes("op", 1, torch.bfloat16, Sizes(), {"width": (16,)}) == Sizes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys, cache):
    pytest.importorskip("triton")
    assert main(["tune"]) == 1
    assert "unike tune: there is no GPU" in capsys.readouterr().err
    assert not cache.exists()
