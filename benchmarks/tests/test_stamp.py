"""The environment of a report."""

import re

import torch
from unike_bench.report import stamp

from unike_kernels import _native


def test_says_where_and_with_what():
    found = stamp.stamp()
    assert found["instruction set of the kernels"] == _native.isa()
    assert found["threads"] == str(torch.get_num_threads())
    assert found["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", found["date"])
    assert found["CPU"]


def test_the_commit_is_that_of_this_package(monkeypatch, tmp_path):
    assert stamp._commit() is None or re.fullmatch(r"[0-9a-f]{12}(, with changes)?", stamp._commit())
    elsewhere = tmp_path / "stamp.py"
    elsewhere.touch()
    monkeypatch.setattr(stamp, "__file__", str(elsewhere))
    assert stamp._commit() is None
