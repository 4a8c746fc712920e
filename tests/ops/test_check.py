"""Each check passes what it should, and else raises an error that names the argument, the wanted and the given."""

from __future__ import annotations

import pytest
import torch

from unike_kernels.ops import _check

ROW = torch.zeros(2, 3)


@pytest.mark.parametrize("dtype", _check.FLOATS)
def test_each_float_dtype_passes(dtype):
    _check.floating("x", ROW.to(dtype), (2, None))


def test_what_fits_passes():
    _check.rows("x", ROW)
    _check.instance("x", ROW, torch.Tensor)
    _check.integer("x", torch.zeros(4, dtype=torch.int64), (4,))
    _check.sized("x", torch.zeros(()), ())
    _check.same_device("x", ROW, y=ROW, z=None)
    _check.one_of("x", "b", ("a", "b"))
    _check.frozen(x=ROW, y=None)
    with torch.no_grad():
        _check.frozen(x=ROW.clone().requires_grad_())


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: _check.floating("x", [1.0], (1,)), TypeError, "x: expected a tensor, got list"),
        (lambda: _check.floating("x", ROW.int(), (2, 3)), TypeError, r"x: expected float32, .*got int32\[2, 3\]"),
        (lambda: _check.floating("x", ROW.to(torch.complex64), (2, 3)), TypeError, r"x: .*got complex64\[2, 3\]"),
        (lambda: _check.floating("x", ROW, (None, 4)), ValueError, r"x: expected shape \[\*, 4\], got float32\[2, 3\]"),
        (lambda: _check.floating("x", ROW, (None,)), ValueError, r"x: expected shape \[\*\]"),
        (lambda: _check.rows("x", ROW[0]), ValueError, r"x: expected shape \[\*, \*\], got float32\[3\]"),
        (lambda: _check.rows("x", ROW[:, :0]), ValueError, r"x: expected at least one column, got float32\[2, 0\]"),
        (lambda: _check.instance("x", 1, str), TypeError, "x: expected str, got int"),
        (lambda: _check.integer("x", [1], (1,)), TypeError, "x: expected an int64 tensor, got list"),
        (lambda: _check.integer("x", ROW.int(), (2, 3)), TypeError, r"x: expected an int64 tensor, got int32\[2, 3\]"),
        (lambda: _check.integer("x", ROW.long(), (3, 3)), ValueError, r"x: expected shape \[3, 3\], got int64\[2, 3\]"),
        (lambda: _check.sized("x", ROW, (1, 3)), ValueError, r"x: expected shape \[1, 3\]"),
        (lambda: _check.same_device("x", ROW, y=ROW.to("meta")), ValueError, r"y: expected device cpu \(as x\), got m"),
        (lambda: _check.one_of("x", "c", ("a", "b")), ValueError, "x: expected one of a, b; got 'c'"),
        (lambda: _check.frozen(x=ROW.clone().requires_grad_()), ValueError, "x: requires_grad is set"),
    ],
)
def test_what_does_not_fit_is_an_error(check, error, message):
    with pytest.raises(error, match=message):
        check()
