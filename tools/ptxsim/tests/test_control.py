"""Where lanes that parted meet again, and that the bench stands on its own."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import ptxsim
import pytest
from one_instruction import assert_same, execute
from ptxsim.control import _weak_topological_order

LANE = np.arange(64) % 32

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("schedule", ["lockstep", "reversed", "random:0"])
def test_lanes_meet_behind_a_loop_that_they_leave_at_different_times(schedule):
    """The exit stands before the body in the text: its lanes must wait all the same."""
    text = """
    .reg .pred p; .reg .b32 i; .reg .b32 lane; mov.u32 lane, %laneid; mov.b32 i, 0; mov.b32 $d0, 0;
    bra head;
    out:
    shfl.sync.bfly.b32 $d0, $d0, 1, 31, -1;
    bra done;
    head:
    setp.ge.u32 p, i, lane;
    @p bra out;
    add.u32 $d0, $d0, 10; add.u32 i, i, 1;
    bra head;
    done:
    """
    (got,) = execute(text, [np.zeros(64, "u4")], ["u4"], schedule)
    assert_same(got, (10 * (LANE ^ 1)).astype("u4"))


def test_lanes_meet_behind_a_branch_whose_one_side_stands_at_the_end():
    text = """
    .reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid; setp.lt.u32 p, lane, 5;
    @p bra cold;
    mov.b32 $d0, 1;
    meet:
    redux.sync.add.u32 $d0, $d0, -1;
    bra done;
    cold:
    mov.b32 $d0, 100;
    bra meet;
    done:
    """
    (got,) = execute(text, [np.zeros(64, "u4")], ["u4"])
    assert_same(got, np.full(64, 5 * 100 + 27, "u4"))


def test_lanes_that_left_are_not_waited_for():
    text = """
    .reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid; setp.lt.u32 p, lane, 5; mov.b32 $d0, 7;
    ld.param.u64 base, [out0]; mad.wide.u32 at, thread, 4, base;
    @p st.global.b32 [at], $d0;
    @p exit;
    bar.sync 0;
    redux.sync.add.u32 $d0, 1, -1;
    """
    (got,) = execute(text, [np.zeros(64, "u4")], ["u4"])
    assert_same(got, np.where(LANE < 5, 7, 27).astype("u4"))


def test_blocks_of_a_loop_are_contiguous():
    # 0 -> 1; 1 -> 4 (exit) or 2; inner loop 2 -> 3 -> 2; 3 -> 1
    order, loops = _weak_topological_order([[1], [4, 2], [3], [2, 1], []])
    assert order == [0, 1, 2, 3, 4]
    assert sorted(map(sorted, loops)) == [[1, 2, 3], [2, 3]]


def test_it_stands_on_its_own():
    """numpy and the standard library only; Triton, torch and pytest where the README says."""
    allowed = {"triton_driver.py": {"triton", "torch"}, "static.py": {"triton"}, "sass.py": {"triton"}}
    allowed["plugin.py"] = {"pytest", "torch"}
    folder = Path(ptxsim.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names | {"numpy"} | allowed.get(path.name, set()), (path.name, name)
