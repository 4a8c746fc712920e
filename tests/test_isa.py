"""The table of instruction sets: which kernels a process uses, and what they have in common."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import kernels_of

from unike_kernels import _native
from unike_kernels.ops.cosine_topk import cpu

ROOT = Path(__file__).resolve().parents[1]


def run_with(value: str, code: str) -> str:
    """What `code` prints in a process with this UNIKE_ISA, given the extension alone as `core`."""
    load = (
        "import importlib.util, os, sys; spec = importlib.util.spec_from_file_location('_C', sys.argv[1]);"
        "core = importlib.util.module_from_spec(spec); spec.loader.exec_module(core);"
    )
    command = [sys.executable, "-c", load + code, _native.__dict__["_C"].__file__]
    environment = os.environ | {"UNIKE_ISA": value}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


@pytest.mark.parametrize("level", _native.isas())
def test_the_environment_names_a_level(level):
    later = "os.environ['UNIKE_ISA'] = 'none'; print(core.cpu_isa())"
    assert run_with(level, f"print(core.cpu_isa()); {later}").split() == [level, level]


def test_the_best_level_is_the_default():
    assert run_with("", "print(core.cpu_isa())") == _native.isas()[-1]
    assert _native.isas()[0] == "baseline"


CALL = """
import array
x = array.array('f', [3, 4]); out = array.array('f', [0, 0])
def normalize():
    try:
        core.normalize_rows((x.buffer_info()[0], 0, 2), 1, 2, out.buffer_info()[0], 1)
    except ValueError as error:
        print(error)
normalize(); normalize()
print(list(out), core.cpu_isa())
os.environ['UNIKE_ISA'] = 'baseline'
normalize(); print(list(out) != [0, 0], core.cpu_isa())
"""


def test_an_unknown_level_fails_every_call_until_it_is_mended():
    *refusals, untouched, mended = run_with("avx1024", CALL).splitlines()
    assert len(refusals) == 2
    for refusal in refusals:
        assert refusal.startswith("UNIKE_ISA: expected an instruction set that this CPU has (baseline")
        assert ", ".join(_native.isas()) in refusal and refusal.endswith('got "avx1024"')
    assert untouched == "[0.0, 0.0] invalid UNIKE_ISA"
    assert mended == "True baseline"


@pytest.mark.parametrize("name", ["avx1024", "", "AVX2", "baseline,avx2"])
def test_another_name_is_refused_and_changes_nothing(name):
    with kernels_of("baseline"):
        with pytest.raises(ValueError, match=r"isa: expected .* \(baseline") as error:
            _native.set_isa(name)
        assert str(error.value).endswith(f'got "{name}"')
        assert _native.isa() == "baseline"


def test_none_gives_the_default_back():
    with kernels_of("baseline"):
        _native.set_isa(None)
        assert _native.isa() == (os.environ.get("UNIKE_ISA") or _native.isas()[-1])


def test_each_level_has_a_row_a_file_and_flags():
    rows = re.findall(r'^ +\{"(\w+)", ', (ROOT / "csrc/cpu/isa.cpp").read_text(), re.MULTILINE)
    files = [path.stem for path in (ROOT / "csrc/cpu/isa").glob("*.cpp")]
    flags = re.findall(r'^ {8}"(\w+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(files) == sorted(["baseline", *flags])
    assert set(_native.isas()) <= set(rows)


@pytest.mark.parametrize("level", _native.isas())
def test_float16_codes_are_rounded_as_everywhere(level):
    """All numbers of float16, the midpoints between them, and their neighbours in float32; and back."""
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    exact = halves.float()
    between = (exact[1:].double() + exact[:-1].double()).div(2).float()
    bits = between.view(torch.int32)
    values = torch.cat([exact, between, *((bits + i).view(torch.float32) for i in (-1, 1)), torch.full((3,), 65520.0)])
    values = torch.cat([values, -values])
    rows = torch.nn.functional.pad(values, (0, -len(values) % 64)).reshape(-1, 64)
    codes, bounds = torch.empty(len(rows), 64, dtype=torch.float16), torch.empty(len(rows), cpu.KEY_BOUNDS)
    with kernels_of(level):
        cpu.pack_keys(rows, torch.zeros(64), codes, bounds)
        assert torch.equal(codes.view(torch.int16), rows.half().view(torch.int16))
        cpu.pack_keys(exact.reshape(-1, 64), torch.zeros(64), codes[:496], bounds[:496])
    assert not bounds[:496, 2].any()  # the residual: what the codes say is what they were made of
