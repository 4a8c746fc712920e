"""docs/gpu-bounds.md is what its command makes, and every operator is one launch."""

from pathlib import Path

import pytest
from ops.gpu import bounds_table

ASKED = (4, 5)  # columns of what is asked for
# A buffer that does not begin with a sector adds one to each request of a warp, 16 sectors of 16 bytes a lane.
BEGINNING = 1 / 16


@pytest.mark.slow
def test_the_table_in_the_docs():
    path = Path(__file__).resolve().parents[3] / "docs" / "gpu-bounds.md"
    written, made = path.read_text(encoding="utf-8").splitlines(), bounds_table.table().splitlines()
    assert len(written) == len(made)
    for line, wanted in zip(written, made, strict=True):
        cells, others = line.split(" | "), wanted.split(" | ")
        if line.startswith("| ") and cells[2].isdigit():
            assert cells[2] == "1"
            for i in ASKED:
                assert float(cells[i]) == pytest.approx(float(others[i]), rel=BEGINNING, abs=0.01)
            cells, others = ([c for i, c in enumerate(row) if i not in ASKED] for row in (cells, others))
        assert cells == others
