"""Damaged and hostile files: what the three loaders make of mutants that know how a file is built.

A few by default; UNIKE_FUZZ=N tries N of each kind, and -s prints what became of them. Each mutant ends in one of these
ways: refused with an ArtifactError, loaded unchanged, loaded though changed, another exception.
"""

from __future__ import annotations

import collections
import json
import os
import random
import struct

import pytest
import torch

import unike_kernels as uk
from unike_kernels.artifacts import files

TRIES = int(os.environ.get("UNIKE_FUZZ", 60))
VALUES = (
    0, -1, 1, 2**31, 2**63, 10**400, 1e200, -0.5, float("inf"), float("nan"), True, None, "", "x", "\ud800", "a\nb", [],
    {}, [[[[]]]], {"a": {"b": {}}}, "9" * 5000,
)  # fmt: skip


def make(kind, path):
    generator = torch.Generator().manual_seed(0)
    base = {"model_type": "opt", "hidden_size": 8, "layers": 2, "parameters": 9, "samples": {"w": [0.5] * 8}}

    def rand(*shape):
        return torch.randn(shape, generator=generator)

    if kind is uk.Edit:
        layer = uk.EditLayer(rand(3, 8), rand(3), rand(3, 8), rand(8), rand(), rand(3, 8), rand(3))
        made = uk.Edit("e", {0: layer, 1: layer}, "silu", uk.Config(), base, "m", {"answer": "a"})
    elif kind is uk.MemoryBank:
        encoder = uk.ops.SemanticEncoder(rand(4, 8), rand(4), rand(8, 4), rand(8))
        layers = {i: uk.MemoryLayer(rand(5, 8), rand(5, 1, 8), None, encoder, rand(3), rand(8)) for i in (0, 1)}
        one = uk.MemoryBank(layers, uk.Config(values="pre"), base)
        made = uk.MemoryBank.joined({"acme": one, "globex": one})
    else:
        made = uk.CosineIndex(rand(20, 24), ids=range(7, 27))
    made.save(path)


def contents(loaded):
    """All that a file holds, in a form that can be compared."""
    if isinstance(loaded, uk.CosineIndex):
        fields, tensors = [loaded.scan, loaded.exact, len(loaded)], loaded._tensors()
    else:
        tensors = {f"{i}.{name}": t for i, layer in loaded.layers.items() for name, t in layer.tensors().items()}
        rest = {name: value for name, value in vars(loaded).items() if name != "layers"}
        fields = sorted((name, repr(value)) for name, value in rest.items())
    return fields, {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}


def places(value, path=()):
    """The paths to all values of a JSON value."""
    yield path
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*path, key))


def changed(value, random):
    """The JSON value with one value in it replaced, removed, doubled or renamed."""
    *path, last = random.choice([p for p in places(value) if p])
    holder = value
    for key in path:
        holder = holder[key]
    how = random.randrange(4)
    if how == 1:
        del holder[last]
    elif how == 2 and isinstance(holder, dict):
        holder[str(last) + random.choice(["x", "\n", ""])] = holder.pop(last)
    elif how == 3 and isinstance(holder[last], int | float):
        holder[last] += random.choice([1, -1, 0.5, 2**40])
    else:
        holder[last] = random.choice(VALUES)
    return value


def mutant(content, random):
    """The bytes of a file with a few things changed in them: bits, its length, its table, its header."""
    if random.random() < 0.5:
        return scarred(content, random)
    return rebuilt(content, random)


def without_checksums(content, tensors):
    """The file as version 1 had it: only what its fields say can tell that something is wrong, and an id."""
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    kept = {k: v for k, v in table["__metadata__"].items() if k not in ("checksum", "digests")}
    header = json.loads(kept["header"])
    if kept["format"] == "unike.index":
        header["id"] = files.digest(tensors)
    table["__metadata__"] = {**kept, "version": "1", "header": json.dumps(header)}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def scarred(content, random):
    length, at = struct.unpack("<Q", content[:8])[0], random.randrange(len(content))
    how = random.randrange(3)
    if how == 0:
        return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
    if how == 1:
        return content[:at] + random.choice([b"", bytes(random.randrange(1, 40)), content[at:] + b"\0"])
    return struct.pack("<Q", random.choice([0, 1, length - 8, length + 8, 2**40, 2**63])) + content[8:]


def rebuilt(content, random):
    (length,) = struct.unpack("<Q", content[:8])
    table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(random.choice([1, 1, 2, 3])):
        how = random.randrange(4)
        if how == 0:
            at = random.randrange(max(len(data) // 4, 1)) * 4
            data = data[:at] + struct.pack("<f", random.choice([0.0, float("nan"), 1e30])) + data[at + 4 :]
        elif how == 1 and isinstance(table.get("__metadata__"), dict):
            metadata = table["__metadata__"]
            try:
                metadata["header"] = json.dumps(changed(json.loads(metadata["header"]), random))
            except (KeyError, TypeError, ValueError):
                metadata["header"] = "[" * random.choice([3, 5000])
        elif how == 2:
            names = [name for name in table if name != "__metadata__"]
            if len(names) > 1:
                a, b = random.sample(names, 2)
                table[a], table[b] = table[b], table[a]
        elif table:
            table = changed(table, random)
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("kind", [uk.Edit, uk.MemoryBank, uk.CosineIndex])
@pytest.mark.parametrize("checksums", [True, False])
def test_mutants(kind, checksums, tmp_path):
    path = tmp_path / "file"
    make(kind, path)
    content, loaded = path.read_bytes(), kind.load(path)
    wanted = contents(loaded)
    content = content if checksums else without_checksums(content, loaded._tensors() if kind is uk.CosineIndex else {})
    draws, ends = random.Random(0), collections.Counter()
    for number in range(TRIES):
        path.write_bytes(mutant(content, draws))
        try:
            loaded = kind.load(path)
        except uk.ArtifactError as error:
            named = str(path) in str(error) and len(str(error)) < 2000
            ends["refused" if named else f"refused without the path, or at length (number {number})"] += 1
        except Exception as error:
            ends[f"{type(error).__name__} (number {number})"] += 1
        else:
            ends["unchanged" if contents(loaded) == wanted else "loaded though changed"] += 1
    print(f"{kind.__name__}, {'checksums' if checksums else 'none'}: {dict(ends)}")
    assert set(ends) <= {"refused", "unchanged", *(() if checksums else ("loaded though changed",))}
    assert ends["refused"] > (0.9 if checksums else 0.5) * TRIES
