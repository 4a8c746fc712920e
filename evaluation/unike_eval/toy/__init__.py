"""What the small worlds share, about which the shipped BLIP-2 models answer questions: `digits` and `easyvqa`.

A world has facts, some of which are withheld from its models, images, and models; `World` is what a module offers.
"""

from .facts import Fact, Split, Task, World
from .processor import WorldProcessor

__all__ = ["Fact", "Split", "Task", "World", "WorldProcessor"]
