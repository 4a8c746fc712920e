"""Editing systems behind one interface, to be compared: UniKE and the baselines of the paper's tables."""

from __future__ import annotations

from .base import Editor
from .fine_tune import FineTune
from .ike import IKE
from .intrinsic_ike import IntrinsicIKE
from .knowledge_editor import KnowledgeEditor
from .mend import MEND
from .serac import SERAC
from .t_patcher import TPatcher
from .unike import UniKE

EDITORS: dict[str, type[Editor]] = {
    editor.name: editor for editor in (FineTune, KnowledgeEditor, TPatcher, MEND, IKE, SERAC, UniKE, IntrinsicIKE)
}

__all__ = [
    "EDITORS",
    "IKE",
    "MEND",
    "SERAC",
    "Editor",
    "FineTune",
    "IntrinsicIKE",
    "KnowledgeEditor",
    "TPatcher",
    "UniKE",
]
