"""Editing systems behind one interface, to be compared: UniKE, the baselines of the paper's tables, and newer ones."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .base import Editor
from .fine_tune import FineTune
from .grace import GRACE
from .ike import IKE
from .intrinsic_ike import IntrinsicIKE
from .knowledge_editor import KnowledgeEditor
from .latent_ike import LatentIKE
from .lora import LoRA
from .memit import MEMIT, AlphaEdit
from .mend import MEND
from .serac import SERAC
from .t_patcher import TPatcher
from .unike import UniKE
from .wise import WISE

EDITORS: dict[str, type[Editor]] = {
    editor.name: editor
    for editor in (
        *(FineTune, KnowledgeEditor, TPatcher, MEND, IKE, SERAC, UniKE, IntrinsicIKE),  # the paper's
        *(LatentIKE, LoRA, GRACE, WISE, MEMIT, AlphaEdit),
    )
}


def make_editor(name: str, model: nn.Module, processor: Any, seed: int = 0, **settings: Any) -> Editor:
    """A system, not fitted; the seed is of what is random in it, if anything."""
    system = EDITORS[name]
    if "seed" in inspect.signature(system).parameters:
        settings["seed"] = seed
    return system(model, processor, **settings)


__all__ = [
    "EDITORS",
    "GRACE",
    "IKE",
    "MEMIT",
    "MEND",
    "SERAC",
    "WISE",
    "AlphaEdit",
    "Editor",
    "FineTune",
    "IntrinsicIKE",
    "KnowledgeEditor",
    "LatentIKE",
    "LoRA",
    "TPatcher",
    "UniKE",
    "make_editor",
]
