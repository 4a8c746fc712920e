"""What the cost model says of the GPU kernels at their real shapes.

PYTHONPATH=.:tests:tools/ptxsim python -m ops.gpu.cost_report PART-OF-A-NAME [A100, H100 or B200]: loop by loop
PYTHONPATH=.:tests:tools/ptxsim python -m ops.gpu.cost_report budgets [PART-OF-A-NAME]: the lines of test_costs.py
"""

from __future__ import annotations

import sys

from ops.gpu.real_launches import REAL
from ops.gpu.test_costs import measure
from ptxsim.cost import MACHINES


def report(part: str, machine: str) -> None:
    """Each launch of which `part` is in the name."""
    on = MACHINES[machine]
    for name, real in REAL.items():
        if part in name:
            print(f"{name}: bound {1e6 * real.bound(on):.1f} us, others about {1e6 * real.peer(on):.0f} us")
            print(real.cost(on), "\n", flush=True)


def budgets(part: str) -> None:
    """Python that test_costs.py holds."""
    for name, real in REAL.items():
        if part in name:
            found, _ = measure(real)
            print(f'    "{name}": Budget{tuple(found)},', flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("\n".join([__doc__ or "", *REAL]))
    if sys.argv[1] == "budgets":
        budgets("".join(sys.argv[2:]))
    else:
        report(sys.argv[1], "".join(sys.argv[2:]) or "H100")
