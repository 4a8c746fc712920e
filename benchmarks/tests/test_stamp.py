"""The environment of a report."""

import re

import torch
from unike_bench.report import stamp

from unike_kernels import _native


def test_says_where_and_with_what():
    found = stamp.stamp()
    assert {_native.isa(), str(torch.get_num_threads()), torch.__version__} <= set(found.values())
    assert found["CPU"] and re.match(r"\d{4}-\d\d-\d\d", found["date"])


def test_the_commit_is_that_of_this_package(monkeypatch, tmp_path):
    assert re.match(r"[0-9a-f]{12}\b", stamp.stamp().get("commit", "0" * 12))
    elsewhere = tmp_path / "stamp.py"
    elsewhere.touch()
    monkeypatch.setattr(stamp, "__file__", str(elsewhere))
    assert "commit" not in stamp.stamp()
