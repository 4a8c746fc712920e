"""Benchmarks of the CPU kernels: what is timed, against whom and against which bounds of the machine, and the reports.

Every output is checked before anything is timed; `unike bench` runs it all, `benchmarks/` hands the same to pytest.
"""
