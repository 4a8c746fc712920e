"""A second, harder world to edit: coloured shapes and the questions about them of easy-VQA (the PyPI package).

5,000 images of 64 x 64 pixels with one shape each, at any place and of any size: a circle, rectangle or triangle in one
of eight colours. Two BLIP-2 models were trained on its training images and on questions in its words, some of whose
answers were withheld::

    model, processor = easyvqa.load_model("opt"), easyvqa.load_processor()
    images, labels = easyvqa.images("test")
    batch = processor(text="question: what color is the shape ? answer:", images=images[0])
    print(processor.batch_decode(model.generate(**batch, max_new_tokens=6), skip_special_tokens=True))

What is harder than in `digits`: facts that are edited and facts that must stay differ in a word of the question or in
one property of the image, and half of the kinds of questions are answered with "yes" or "no", or with a negation.
"""

from ..digits import text_facts, text_items
from .data import images, showing
from .facts import FACTS, SORTS
from .model import load_model, load_processor

__all__ = ["FACTS", "SORTS", "images", "load_model", "load_processor", "showing", "text_facts", "text_items"]
