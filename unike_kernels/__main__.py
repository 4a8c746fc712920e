"""`python -m unike_kernels` is the command `unike`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
