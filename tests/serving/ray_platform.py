"""A platform plugin of vLLM: its CPU, of which Ray may count devices; vLLM's own names none that Ray could count."""

from vllm.platforms.cpu import CpuPlatform


class CountedCpu(CpuPlatform):
    """Each rank gets one of the GPUs that a cluster is told to have; nothing runs on them."""

    ray_device_key = "GPU"


def counted() -> str:
    """What vLLM's entry points ask for: the platform's name."""
    return f"{__name__}.{CountedCpu.__name__}"
