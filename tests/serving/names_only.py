"""In the place of a compiled package that SGLang imports and its engine on a CPU does not call: any name, no code.

tests/test_other_packages.py puts it there as torchvision and as sgl_kernel.
"""

import sys


class _Name(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})

    def __call__(cls, *args, **kwargs):
        return cls


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Name(name, (), {})


__version__ = "0.0"
__path__ = []
for _part in ("io", "ops", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional"):
    sys.modules[f"{__name__}.{_part}"] = sys.modules[__name__]
