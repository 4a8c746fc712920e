"""The C ABI and examples/engine.cpp against arguments and files of somebody who means harm, under sanitizers.

A few seconds of each run with all tests. For more: UNIKE_FUZZ_TRIES=100000 UNIKE_FUZZ_SEED=7 pytest -s
tests/test_hostile_calls.py, where the calls take about 0.3 ms each and a file 60 ms.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native.sanitized import program
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

TRIES = int(os.environ.get("UNIKE_FUZZ_TRIES", "0"))
SEED = int(os.environ.get("UNIKE_FUZZ_SEED", "1"))

Header = dict[str, Any]


def test_wrong_calls_of_the_c_abi():
    """Each call with something wrong is refused with a message; each right one works; no byte beyond an array."""
    done = subprocess.run(
        [program("tests/native/abi_fuzz.cpp"), str(TRIES or 4000), str(SEED)], capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [line.split(": ")[1].split() for line in done.stdout.splitlines() if "refused" in line]
    assert len(counts) == 11
    assert all(int(right) > 20 and int(refused) > 100 for right, _, refused, _ in counts)


# --- files ---

LARGE = (2**31, 2**32 + 1, 2**48, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**40)
INTEGERS = (0, 1, 2, 3, 63, 65, -1, -(2**63), *LARGE)


def split(raw: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: Header | str, data: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    encoded = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + data


def name_of(header: Header, rng: random.Random) -> str:
    return rng.choice([name for name in header if name != "__metadata__"])


def mutate_shape(header: Header, data: bytes, rng: random.Random) -> bytes:
    entry = header[name_of(header, rng)]
    shape = entry["shape"]
    kind = rng.randrange(7)
    if kind == 0 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(INTEGERS)
    elif kind == 1 and shape:
        shape[rng.randrange(len(shape))] *= rng.choice((2, 10**6, 2**58, 2**62))
    elif kind == 2:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((*INTEGERS, 1, 1, 1)))
    elif kind == 3 and shape:
        del shape[rng.randrange(len(shape))]
    elif kind == 4:
        shape.reverse()
    elif kind == 5:
        entry["shape"] = [rng.choice((0, 2**62)), rng.choice((2**62, 4, 10**18))]
    else:
        entry["shape"] = rng.choice((None, 5, "3", {}, [[3]], [1.5], ["3"], [True], [1e400], [-0.0], [3, None]))
    return joined(header, data)


def mutate_offsets(header: Header, data: bytes, rng: random.Random) -> bytes:
    entry, other = header[name_of(header, rng)], header[name_of(header, rng)]
    first, last = entry["data_offsets"]
    by = rng.choice((1, 2, 3, 4, 64, len(data), 2**62))
    entry["data_offsets"] = rng.choice(
        ([first, last + by], [first - by, last], [first + by, last + by], [last, first], [first, rng.choice(INTEGERS)],
         [rng.choice(INTEGERS), last], list(other["data_offsets"]), [first], [first, last, last], [], None, "ab")
    )  # fmt: skip
    return joined(header, data)


def mutate_dtype(header: Header, data: bytes, rng: random.Random) -> bytes:
    wrong = ("F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "f32", "F32 ", "", None, 4, ["F32"], {"F32": 1})
    header[name_of(header, rng)]["dtype"] = rng.choice(wrong)
    return joined(header, data)


def mutate_fields(header: Header, data: bytes, rng: random.Random) -> bytes:
    name = name_of(header, rng)
    kind = rng.randrange(7)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[name + rng.choice(("x", "\0", "", " "))] = header.pop(name)
    elif kind == 2:
        del header[name][rng.choice(list(header[name]))]
    elif kind == 3:
        header[name][rng.choice(("extra", "Shape", ""))] = rng.choice((1, [], "a"))
    elif kind == 4:
        header[name] = rng.choice((None, 1, "a", [], {}, {"dtype": {}}))
    elif kind == 5:
        header[name + ".again"] = header[name]
    else:
        return joined(json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}', data)
    return joined(header, data)


def mutate_json(header: Header, data: bytes, rng: random.Random) -> bytes:
    text = json.dumps(header)
    at = rng.randrange(len(text))
    kind = rng.randrange(7)
    if kind == 0:
        text = text[:at] + rng.choice('{}[]:,"\\-0e.\0') + text[at + 1 :]
    elif kind == 1:
        text = text[:at] + rng.choice('{}[]:,"\\-0e.') + text[at:]
    elif kind == 2:
        text = text[:at]
    elif kind == 3:
        deep = rng.choice((100, 10_000, 200_000))
        text = '{"a": ' + rng.choice(("[", '{"a":')) * deep
    elif kind == 4:
        text = text.replace('"shape": [', '"shape": [' + "9" * rng.choice((20, 5000)) + ", ", 1)
    elif kind == 5:
        text = rng.choice(("", "{}", "[]", "null", "{", '"', '{"__metadata__": {}}', " " * 5000, '{"a\\'))
    else:
        header["__metadata__"] = rng.choice(({"a": 1}, [], "a", {"a": {}}, {"a": "\\" * 999}, None))
        text = json.dumps(header)
    return joined(text, data)


def mutate_file(header: Header, data: bytes, rng: random.Random) -> bytes:
    raw = bytearray(joined(header, data))
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(raw[: rng.randrange(len(raw))])
    if kind == 1:
        return struct.pack("<Q", rng.choice((0, 1, 7, 2**31, 2**62, 2**63, 2**64 - 1, 2**64 - 8))) + bytes(raw[8:])
    if kind == 2:
        return bytes(raw) + bytes(rng.choice((1, 4, 64)))
    if kind == 3:
        for _ in range(rng.choice((1, 3, 20))):
            raw[rng.randrange(len(raw) - len(data))] = rng.randrange(256)
        return bytes(raw)
    bad = struct.pack("<I", rng.choice((0x7FC00000, 0x7F800000, 0xFF800000, 0x7F800001)))
    at = 4 * rng.randrange(len(data) // 4)
    return joined(header, data[:at] + bad + data[at + 4 :])


MUTATIONS: list[Callable[[Header, bytes, random.Random], bytes]] = [
    mutate_shape, mutate_shape, mutate_offsets, mutate_offsets, mutate_dtype, mutate_fields, mutate_json, mutate_file,
]  # fmt: skip


def other_tensors(path: Path, rng: random.Random) -> None:
    """A file that is whole, with a tensor that is of another size than the others expect."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    make = [
        lambda: t[..., : t.shape[-1] // 2].contiguous() if t.dim() else t.reshape(1),
        lambda: torch.cat([t, t]) if t.dim() else t.repeat(3),
        lambda: t[:-1].contiguous() if t.dim() and len(t) > 1 else t.reshape(1, 1),
        lambda: t.unsqueeze(0),
        lambda: t.flatten(),
        lambda: t[:0].contiguous() if t.dim() else t.reshape(1),
    ]
    if rng.random() < 0.3:  # all of them, by a like amount: an edit for another model
        tensors = {n: x[..., : max(x.shape[-1] // 2, 1)].contiguous() if x.dim() else x for n, x in tensors.items()}
    else:
        tensors[name] = rng.choice(make)()
    save_file(tensors, path)


@pytest.fixture
def files(make_model, make_memory, make_edit, tmp_path) -> dict[str, Path]:
    """What the engine is given; only the layer that it computes, so that most faults are of tensors that it reads."""
    model = make_model("llama")
    memory = make_memory(model, entries=7, layers=(3,))
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("memory", "batch", "edit")}
    memory.save(paths["memory"])
    make_edit(model, "a", memory, neurons=2, layers=(3,)).save(paths["edit"])
    save_file({name: torch.randn(3, 64) for name in ("hidden", "attention", "ffn_in", "ffn_out")}, paths["batch"])
    return paths


def run_engine(folder: Path, files: dict[str, Path], layer: str = "3", k: str = "5") -> subprocess.CompletedProcess:
    engine, (memory, batch, edit) = program("examples/engine.cpp"), files.values()
    command = [engine, layer, k, memory, batch, folder / "out.bin", edit, edit]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)


def test_hostile_files(files, tmp_path):
    """Each is refused with a message, or computes what the original does, or is a whole file of the same shapes."""
    rng, outcomes = random.Random(SEED), Counter()
    originals = {name: path.read_bytes() for name, path in files.items()}
    shapes = {name: {n: t.shape for n, t in load_file(path).items()} for name, path in files.items()}
    assert run_engine(tmp_path, files).returncode == 0
    usual = (tmp_path / "out.bin").read_bytes()
    for attempt in range(TRIES or 48):
        name = rng.choice(sorted(files))
        path = files[name]
        if attempt % 6 == 5:
            other_tensors(path, rng)
        else:
            path.write_bytes(rng.choice(MUTATIONS)(*split(originals[name]), rng))
        done = run_engine(tmp_path, files)
        told = f"attempt {attempt}, {name}: {path.read_bytes()[:300]!r}\n{done.stderr[-3000:]}"
        if done.returncode == 0:
            try:
                found = {n: t.shape for n, t in load_file(path).items()}
            except SafetensorError:  # JSON that is wrong where the engine does not look, as an escape in the metadata
                outcomes["the original to this reader"] += 1
                assert (tmp_path / "out.bin").read_bytes() == usual, told
            else:
                outcomes["as good as the original"] += 1
                read = [n for n in found if n in shapes[name] and (name == "edit" or "zeta" not in n)]
                assert all(found[n] == shapes[name][n] for n in read), told
        else:
            outcomes["refused"] += 1
            assert done.returncode == 1 and done.stderr.startswith("engine: ") and len(done.stderr) > 20, told
            assert done.stderr.count("\n") == 1, told
        path.write_bytes(originals[name])
    print(dict(outcomes))
    assert outcomes["refused"] > (TRIES or 48) // 2


@pytest.mark.parametrize(
    ("name", "tensor", "change", "message"),
    [
        ("memory", "layers.3.index", lambda t: t[:, :63], r"expected the shape [*, 64], got [7, 63]"),
        ("memory", "layers.3.keys", lambda t: t[:6], r"layers.3.keys: expected the shape [7, 1, 64], got [6, 1, 64]"),
        ("memory", "layers.3.keys", lambda t: t.reshape(7, 4, 16), "expected the shape [7, 1, 64], got [7, 4, 16]"),
        ("memory", "layers.3.encoder.w2", lambda t: t[:, :3], "encoder.w2: expected the shape [64, 16], got [64, 3]"),
        ("memory", "layers.3.encoder.b1", lambda t: t[:1], "encoder.b1: expected the shape [16], got [1]"),
        ("edit", "layers.3.keys", lambda t: t[:, :32], "layers.3.keys: expected the shape [*, 64], got [2, 32]"),
        ("edit", "layers.3.values", lambda t: t[:1], "layers.3.values: expected the shape [2, 64], got [1, 64]"),
        ("edit", "layers.3.beta", lambda t: t.reshape(1), "layers.3.beta: expected the shape [], got [1]"),
        ("edit", "layers.3.zeta", lambda t: t * float("nan"), "layers.3.zeta holds NaN or infinity"),
        ("batch", "attention", lambda t: t[:2], "attention: expected the shape [3, 64], got [2, 64]"),
        ("batch", "hidden", lambda t: t[:, :0], "hidden: expected at least one column, got [3, 0]"),
    ],
)
def test_what_the_engine_says(files, tmp_path, name, tensor, change, message):
    tensors = load_file(files[name])
    save_file(tensors | {tensor: change(tensors[tensor]).contiguous()}, files[name])
    done = run_engine(tmp_path, files)
    assert (done.returncode, message in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize(("layer", "k"), [("3", "-1"), ("3", str(2**62)), ("3", "x"), ("9", "5"), ("", "5")])
def test_wrong_words_on_the_command_line(files, tmp_path, layer, k):
    done = run_engine(tmp_path, files, layer, k)
    assert done.returncode == 1 and done.stderr.startswith("engine: "), done.stderr


def test_more_entries_than_there_are(files, tmp_path):
    assert run_engine(tmp_path, files, k="100000").returncode == 0
