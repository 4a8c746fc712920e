"""Installing edits and a memory in a model, changing them while it is used, and taking them out again bit for bit."""

from __future__ import annotations

from .compatibility import check_artifacts
from .fold import fold
from .hot_swap import add_edit, remove_edit, set_beta, set_layers, swap_memory
from .install import PatchReport, is_patched, patch, patched, patched_ffns, unpatch
from .installed import InstalledEdit, InstalledReport, installed
from .selection import explain, rows, selecting
from .warm_up import warm_up

__all__ = [
    "InstalledEdit",
    "InstalledReport",
    "PatchReport",
    "add_edit",
    "check_artifacts",
    "explain",
    "fold",
    "installed",
    "is_patched",
    "patch",
    "patched",
    "patched_ffns",
    "remove_edit",
    "rows",
    "selecting",
    "set_beta",
    "set_layers",
    "swap_memory",
    "unpatch",
    "warm_up",
]
