"""A small real model to edit: two BLIP-2 models trained on handwritten digits, their data and the facts they lack.

The models were taught to answer 12 kinds of questions about an image of a digit. For each kind the answers for two or
three digits were withheld from training in every phrasing, so each model has real hallucinations there::

    model, processor = digits.load_model("opt"), digits.load_processor()
    images, labels = digits.images("test")
    batch = processor(text=digits.phrasings("next")[0], images=images[0])
    print(processor.batch_decode(model.generate(**batch, max_new_tokens=6), skip_special_tokens=True))

BLIP-2's `generate` returns the prompt too. A prompt without an image goes to `model.language_model`. An answer is
joined to its prompt with one space.
"""

from .. import Fact
from .data import images, showing
from .facts import FACTS, facts, phrasings, text_facts, text_items
from .model import load_model, load_processor

__all__ = [
    "FACTS",
    "Fact",
    "facts",
    "images",
    "load_model",
    "load_processor",
    "phrasings",
    "showing",
    "text_facts",
    "text_items",
]
