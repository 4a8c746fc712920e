"""docs/gpu-bounds.md is what its command makes."""

import re
from pathlib import Path

import pytest
from ops.gpu import bounds_table
from ops.gpu.test_costs import SLACK

NUMBER = re.compile(r"\d+\.?\d*(?:e[-+]\d+)?")


@pytest.mark.slow(minutes=10)
def test_the_tables_in_the_docs():
    path = Path(__file__).resolve().parents[3] / "docs" / "gpu-bounds.md"
    written, made = path.read_text(encoding="utf-8"), bounds_table.table()
    assert NUMBER.sub("#", written) == NUMBER.sub("#", made)
    for line, wanted in zip(written.splitlines(), made.splitlines(), strict=True):
        for a, b in zip(NUMBER.findall(line), NUMBER.findall(wanted), strict=True):
            assert float(a) == pytest.approx(float(b), rel=SLACK - 1, abs=0.01), line
