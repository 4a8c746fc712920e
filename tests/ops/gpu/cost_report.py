"""What the cost model says of one launch at its real shape, loop by loop.

PYTHONPATH=.:tests:tools/ptxsim python -m ops.gpu.cost_report [part of a name] [A100, H100 or B200]
"""

from __future__ import annotations

import sys

from ops.gpu.real_launches import REAL
from ptxsim.cost import MACHINES

if __name__ == "__main__":
    part, machine, *_ = [*sys.argv[1:], *["", "H100"][len(sys.argv) - 1 :]]
    found = [real for name, real in REAL.items() if part and part in name]
    if not found or machine not in MACHINES:
        sys.exit("\n".join([__doc__ or "", *REAL]))
    for real in found:
        on = MACHINES[machine]
        print(f"{real.name}: bound {1e6 * real.bound(on):.1f} us, others about {1e6 * real.peer(on):.0f} us")
        print(real.cost(on), "\n")
