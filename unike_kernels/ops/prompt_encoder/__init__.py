"""The key of a prompt, by which the memory decides where an edit acts.

Blocks that learn to tell what a prompt is about and what is asked of that read its text: learned queries attend to its
tokens, each with its embedding and with the spelling of the whole word that it is a part of. For names are cut into
other tokens at the start of a line than within a sentence, but they are spelled alike, and embeddings alone would not
tell that they are one. Where prompts have images, the last token's states tell what these show.
"""

from __future__ import annotations

from .api import PreparedEncoder
from .nearest import nearest, surely_about
from .reference import PromptEncoder, StateBlock, Text, TextBlock, encode_prompts
from .spelling import SPELLING, Vocabulary

__all__ = [
    "SPELLING",
    "PreparedEncoder",
    "PromptEncoder",
    "StateBlock",
    "Text",
    "TextBlock",
    "Vocabulary",
    "encode_prompts",
    "nearest",
    "surely_about",
]
