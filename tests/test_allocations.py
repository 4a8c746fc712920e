"""No tensor of the library takes its dtype or device from torch's global defaults, which belong to the user.

Two global settings, `torch.set_default_dtype` and `torch.set_default_device`, decide what `torch.empty(3)` is; the
address of one of half the size, given to a kernel that writes float32, corrupts the heap.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "unike_kernels"
# What shows things to people, and never touches a user's tensors.
EXEMPT = ("cli",)

FACTORIES = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "complex", "empty", "empty_permuted",
    "empty_strided", "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "normal",
    "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
}  # fmt: skip
LEGACY = {"BoolTensor", "FloatTensor", "IntTensor", "LongTensor", "Tensor"}  # constructors of torch
METHODS = {"new", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"}
MODULES = {"Bilinear", "Conv1d", "Conv2d", "Embedding", "LayerNorm", "Linear", "RMSNorm"}


def names(call: ast.Call) -> set[str]:
    return {keyword.arg for keyword in call.keywords if keyword.arg is not None}


def faults(source: str) -> list[str]:
    """Each allocation that leaves something to the defaults, as "line: what it lacks"."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.nn")
        for alias in node.names
    }
    aliases = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "torch" and alias.asname
    } | {"torch"}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        # A factory that is kept or passed on would be called where this test cannot see it.
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
            loose = node.attr in FACTORIES and id(node) not in called
            found += [f"{node.lineno}: torch.{node.attr} is not called"] if loose else []
        if not isinstance(node, ast.Call):
            continue
        name, holder = None, ""
        if isinstance(node.func, ast.Attribute):
            name, holder = node.func.attr, ast.unparse(node.func.value)
        elif isinstance(node.func, ast.Name) and node.func.id in imported:
            name, holder = imported[node.func.id], "torch"
        if name is None:
            continue
        wanted: set[str] = set()
        if (holder in aliases and name in FACTORIES) or (holder in ("nn", "torch.nn", "torch") and name in MODULES):
            wanted = {"dtype", "device"}
        elif name in METHODS and holder not in aliases:
            wanted = {"dtype"}  # the device is that of the tensor
        elif holder in aliases and name in LEGACY:
            found.append(f"{node.lineno}: torch.{name}(...) takes no dtype")
        elif holder in aliases and name == "Generator" and not node.args and "device" not in names(node):
            wanted = {"device"}
        if lacking := sorted(wanted - names(node)):
            found.append(f"{node.lineno}: {holder}.{name}(...) names no {' and no '.join(lacking)}")
    return found


def sources() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in EXEMPT]


def test_every_allocation_names_its_dtype_and_device():
    assert len(sources()) > 40
    wrong = [f"{path.relative_to(PACKAGE)}:{fault}" for path in sources() for fault in faults(path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "torch.empty(3)",
        "torch.empty(3, dtype=torch.float32)",
        "torch.zeros(3, device=x.device)",
        "torch.tensor([1])",
        "torch.arange(5, device='cpu')",
        "x.new_zeros(3)",
        "nn.Linear(3, 4)",
        "torch.Generator()",
        "torch.Tensor(3)",
        "make = torch.empty",
        "from torch import empty\nempty(3)",
        "import torch as t\nt.rand(3)",
    ],
)
def test_the_rule_finds(line):
    assert len(faults(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.empty(3, dtype=torch.float32, device='cpu')",
        "torch.empty_like(x)",
        "x.new_zeros(3, dtype=x.dtype)",
        "torch.from_numpy(a)",
        "np.empty(3)",
        "nn.Linear(3, 4, dtype=d, device=c)",
        "torch.Generator('cpu')",
        "isinstance(x, torch.Tensor)",
    ],
)
def test_the_rule_lets_pass(line):
    assert faults(line) == []
