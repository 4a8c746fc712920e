"""Installs the drawings of flags: `python -m unike_eval.flags`."""

from __future__ import annotations

from .pictures import fetch, folder

fetch()
print(f"the drawings are in {folder()}")
