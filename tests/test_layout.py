"""The direction of dependencies: which part of the repository may know which other part."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "unike_kernels"

# folder of C++ -> what its files may not include
FORBIDDEN_INCLUDES = {
    "csrc": re.compile(r"Python\.h|pybind11/|torch/|ATen/|c10/"),
    "python/src": re.compile(r"torch/|ATen/|c10/|common/|cpu/|cuda/"),
}
# The rooms of the package, a floor a line: a room may import those below it, none beside it and none above it.
FLOORS = (
    ("errors", "_version", "_pages"),
    ("config",),
    ("_native",),
    ("ops",),
    ("artifacts",),
    ("retrieval",),
    ("nn",),
    ("backbones",),
    ("patching",),
    ("training", "serving"),
    ("environment",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OTHERS = ("unike_bench", "unike_eval")  # distributions that build on the package
# These extend transformers' own classes, and are imported by those alone who serve with them.
EXTENSIONS = ("serving/continuous.py", "serving/transformers.py")
REFERENCE_STDLIB = {"__future__", "typing", "math", "itertools", "collections.abc"}


def imports(path: Path, root: Path) -> Iterator[tuple[str, bool]]:
    """All that a file imports, as absolute dotted names, and whether it does so when it is itself imported."""
    module = path.relative_to(root).with_suffix("").parts
    package = module[:-1]  # of `__init__` too: its own folder
    tree = ast.parse(path.read_text())
    deferred = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_once = node not in deferred
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = (*base, *(node.module.split(".") if node.module else ()))
            # Each name may be a module of its own: `from .. import nn`.
            yield from ((".".join((*names, alias.name)), at_once) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((str(name.value), at_once) for name in node.args[:1] if isinstance(name, ast.Constant))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def allowed_in_reference(name: str) -> bool:
    """torch, a little of the standard library, and the references of other operators."""
    if within(name, "torch"):
        return True
    if any(within(name, module) for module in REFERENCE_STDLIB):
        return True
    return re.match(rf"{PACKAGE}\.ops\.\w+\.reference(\.|$)", name) is not None


def violations(root: Path) -> list[str]:
    """One line for each forbidden import or include below `root`."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        inside = path.relative_to(root / PACKAGE)
        for name, at_once in imports(path, root):
            own = name.removeprefix(f"{PACKAGE}.")
            if within(own, "_C") and str(inside) != "_native.py":
                found.append(f"{inside} imports {name}: only _native.py may")
            heavy = ("transformers", *(f"{PACKAGE}.{each[:-3].replace('/', '.')}" for each in EXTENSIONS))
            if at_once and str(inside) not in EXTENSIONS and any(within(name, module) for module in heavy):
                found.append(f"{inside} imports {name} before it is needed")
            if inside.parts[0] == "ops" and inside.name == "reference.py" and not allowed_in_reference(name):
                found.append(f"{inside} imports {name}: a reference imports only torch")
            if any(within(name, other) for other in OTHERS):
                found.append(f"{inside} imports {name}: that builds on this package")
            here, there = inside.parts[0].removesuffix(".py"), own.split(".")[0]
            if name != own and here in FLOOR and there in FLOOR and here != there and FLOOR[there] >= FLOOR[here]:
                found.append(f"{inside} imports {name}: it does not point downwards")
            if here in ("ops", "nn") and within(name, "transformers"):
                found.append(f"{inside} imports {name}: it points upwards")
    for folder, forbidden in FORBIDDEN_INCLUDES.items():
        for path in sorted((root / folder).rglob("*.*")):
            included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
            found += [f"{folder}/{path.name} includes {name}" for name in included if forbidden.match(name)]
    return found


def test_no_violation_in_this_repository():
    files = [path for folder in (PACKAGE, "csrc", "python/src") for path in (ROOT / folder).rglob("*.*")]
    assert {".py", ".h", ".cpp"} <= {path.suffix for path in files}
    assert violations(ROOT) == []


PLANTED = {
    "unike_kernels/serving/__init__.py": "from .continuous import EditingManager",
    "unike_kernels/serving/ragged.py": "from . import transformers",
    "unike_kernels/patching/install.py": "from unike_kernels import _C",
    "unike_kernels/artifacts/edit.py": "import unike_kernels._C as core",
    "unike_kernels/cli/__init__.py": "def f():\n    import importlib\n    importlib.import_module('unike_kernels._C')",
    "unike_kernels/artifacts/memory.py": "import torch, transformers.models",
    "unike_kernels/training/train.py": "try:\n    from transformers import Trainer\nexcept ImportError:\n    pass",
    "unike_kernels/ops/a/reference.py": "import numpy",
    "unike_kernels/ops/b/reference.py": "from . import triton",
    "unike_kernels/ops/c/reference.py": "from ... import _native",
    "unike_kernels/ops/d/__init__.py": "from ...nn import PatchedFFN",
    "unike_kernels/ops/_util.py": "def f():\n    from .. import backbones",
    "unike_kernels/ops/e/triton.py": "def f():\n    import transformers",
    "unike_kernels/nn/ffn.py": "from .. import patching",
    "unike_kernels/nn/attention.py": "def f():\n    from ..backbones.llama import Llama",
    "unike_kernels/config.py": "from .ops import EditPool",
    "unike_kernels/training/a.py": "def f():\n    from ..serving import EditBank",
    "unike_kernels/serving/b.py": "from unike_kernels.training import Sample",
    "unike_kernels/cli/tune.py": "def f():\n    import unike_bench.tune",
    "unike_kernels/patching/c.py": "from unike_eval import metrics",
    "csrc/cpu/isa/a.cpp": "#include <Python.h>",
    "csrc/common/b.h": '#  include "pybind11/pybind11.h"',
    "csrc/include/unike/c.h": "#include <torch/extension.h>",
    "python/src/d.cpp": "#include <ATen/ATen.h>",
    "python/src/e.cpp": '#include "common/topk.h"',
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(name, tmp_path):
    plant(tmp_path, {name: PLANTED[name]})
    assert len(violations(tmp_path)) == 1


def test_what_is_allowed_is_not_reported(tmp_path):
    allowed = {
        "unike_kernels/_native.py": "import unike_kernels._C as _C",
        "unike_kernels/nn/ffn.py": "from .. import ops\nfrom ..ops.patched_ffn import patched_ffn",
        "unike_kernels/patching/install.py": "from .. import nn\ndef f():\n    import transformers",
        "unike_kernels/backbones/a.py": "import typing\nif typing.TYPE_CHECKING:\n    from transformers import X",
        "unike_kernels/ops/a/__init__.py": "from ... import _native\nfrom . import reference, triton",
        "unike_kernels/ops/a/reference.py": (
            "from __future__ import annotations\nimport math\nimport torch.nn.functional as F\nfrom torch import nn\n"
            "from collections.abc import Callable\nfrom ..b.reference import f\n"
            "from unike_kernels.ops.c import reference"
        ),
        "csrc/common/a.h": '#include <vector>\n#include "unike/unike.h"',
        "python/src/a.cpp": '#include <pybind11/pybind11.h>\n#include "unike/unike.h"',
    }
    plant(tmp_path, allowed)
    assert violations(tmp_path) == []
