"""The description of the installation, for bug reports."""

import pytest
import torch

import unike_kernels as uk
from unike_kernels import _native, environment


def test_show_config_names_versions_and_backends():
    lines = uk.show_config().splitlines()
    assert lines[0].startswith(f"unike_kernels {uk.__version__}, Python 3.")
    assert lines[0].endswith(f"torch {torch.__version__}")
    for package in environment._PACKAGES:
        assert any(line.startswith(f"{package}: ") for line in lines)
    backends = {line.split(":")[0]: line for line in lines[-len(uk.ops.operators()) :]}
    assert set(backends) == set(uk.ops.operators())
    assert all("reference" in line for line in backends.values())


def test_a_missing_package_and_a_missing_extension_are_said(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("no-such-package",))
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "reason", lambda: "not built")
    text = uk.show_config()
    assert "no-such-package: not installed" in text
    assert "native extension: missing: not built" in text


def test_lazy_modules_and_unknown_names():
    assert uk.editing.train_edit is not None
    assert uk.evaluation.observe is not None
    assert uk.digits.load_model is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        uk.nonsense  # noqa: B018
