"""Whether edits, a memory and a model belong together."""

from __future__ import annotations

import warnings

from torch import nn

from .. import backbones
from ..artifacts.edit import Edit
from ..artifacts.fingerprint import compare
from ..artifacts.memory import MemoryBank
from ..config import Config
from ..errors import MismatchError


def check_compatibility(
    model: nn.Module,
    decoder: backbones.Decoder,
    edits: list[Edit],
    memory: MemoryBank | None,
    config: Config,
    override: bool,
) -> None:
    """Whether edits, memory, config and model fit. Shapes must; the rest may be overridden."""
    artifacts = [(f"edit {e.id!r}", e) for e in edits] + ([(f"memory {memory.id}", memory)] if memory else [])
    total = len(decoder.layers)
    for name, artifact in artifacts:
        if artifact.hidden_size != decoder.hidden_size:
            raise MismatchError(f"{name}: its hidden size is {artifact.hidden_size}, the model's {decoder.hidden_size}")
        beyond = [i for i in artifact.layers if i >= total]
        if beyond:
            raise MismatchError(f"{name}: it names the layers {beyond}, the model has {total}")
        problems = []
        error, warning = compare(artifact.base_model, model)
        if error:
            problems.append(error)
        if differing := config.differences(artifact.config):
            problems.append(f"its Config differs ({'; '.join(differing)})")
        if isinstance(artifact, Edit):
            activation = {decoder.layers[i].activation for i in artifact.layers}
            if activation != {artifact.activation}:
                raise MismatchError(
                    f"{name}: it is for {artifact.activation} FFNs, the model's are {sorted(activation)}"
                )
            if artifact.memory_id not in (memory.ids if memory else (None,)):
                problems.append(
                    f"it was trained with the memory {artifact.memory_id}, this one is {memory.id if memory else None}"
                )
        if problems and not override:
            raise MismatchError(f"{name}: {'; '.join(problems)}. Pass override=True to use it all the same.")
        if warning:
            warnings.warn(f"{name}: {warning}", stacklevel=3)
