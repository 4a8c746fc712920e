"""Fused kernels for UniKE: fast, exact, reversible knowledge editing of multimodal language models."""

from __future__ import annotations
