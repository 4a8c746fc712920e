"""Finding the decoder layers, the attention and the FFN in a model of Hugging Face or of an engine, by structure.

No model is known by name. A decoder is the submodule whose config is the text config and that holds the list of its
layers; a layer's attention is the child of a class called attention, its FFN the child that holds weights and is
called or of a class called so, or three children that stand inline (OPT); where a layer holds a list of sublayers
(T5), they are looked for there. A layer of a hybrid may have one of them alone: an edit needs the FFN, a memory the
attention. What an FFN computes is proved by computing it once from its matrices: gated, plain, or neither (a mixture of
experts, quantised or adapted weights), in which case the extra neurons stand beside it as they do anywhere.
"""

from __future__ import annotations

from .decoder import (
    Decoder,
    Layer,
    Part,
    Site,
    configured_activation,
    device_of,
    find_decoder,
    placeholder_ids,
    required_placeholder_ids,
    takers_of_ids,
    unwrap,
)
from .ffn import match_activation
from .projections import project_memory, project_queries, score_scale

__all__ = [
    "Decoder",
    "Layer",
    "Part",
    "Site",
    "configured_activation",
    "device_of",
    "find_decoder",
    "match_activation",
    "placeholder_ids",
    "project_memory",
    "project_queries",
    "required_placeholder_ids",
    "score_scale",
    "takers_of_ids",
    "unwrap",
]
