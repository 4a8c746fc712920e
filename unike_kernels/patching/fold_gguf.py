"""A folded model as a GGUF file: the base model's own file with wider FFNs, for llama.cpp and what is built on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MismatchError, UnsupportedModelError

_ALIKE = 0.98  # a cosine of the same weights, one of them quantised, is more


@torch.no_grad()
def fold_into_gguf(folded: nn.Module, base: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the file of the base model anew, with the FFNs of the folded one; all else in it is copied as it is.

    Tokenizer, hyperparameters and other weights come from the base file, so nothing is converted but the FFNs. These
    keep their type where it is F32, F16, BF16 or Q8_0 and fits the new width; else they become F16.

    Args:
        folded: what `fold` returned, of a model that llama.cpp knows.
        base: a GGUF file of the model that was folded, quantised or not.
        out: the new file.

    Raises:
        ImportError: the package gguf is not installed.
        FileNotFoundError: there is no file `base`.
        MismatchError: it is another model's.
        UnsupportedModelError: an architecture whose FFNs gguf has no names for, or of more than one width.
    """
    import gguf

    if not Path(base).is_file():
        raise FileNotFoundError(f"gguf: there is no file {os.fspath(base)!r}")
    reader: Any = gguf.GGUFReader(base)
    architecture = reader.get_field("general.architecture").contents()
    grown = _ffns(folded, architecture, reader)
    old = {tensor.name: tensor for tensor in reader.tensors}
    writer = gguf.GGUFWriter(out, architecture)
    length = f"{architecture}.feed_forward_length"
    width = next(t.shape[1] for name, t in grown.items() if name.endswith("ffn_down.weight"))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = width if field.name == length else field.contents()
        form, inner = field.types[0], field.types[-1]
        writer.add_key_value(field.name, value, form, inner if form == gguf.GGUFValueType.ARRAY else None)
    data: list[np.ndarray[Any, Any]] = []
    for name in [*old, *(name for name in grown if name not in old)]:
        if name in grown:
            like = old[name].tensor_type if name in old else gguf.GGMLQuantizationType.F32  # biases
            values, kind = _stored(grown[name], like)
        else:
            values, kind = old[name].data, old[name].tensor_type
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, kind)
        data.append(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in data:
        writer.write_tensor_data(values, tensor_endianess=reader.endianess)
    writer.close()


def _ffns(folded: nn.Module, architecture: str, reader: Any) -> dict[str, Tensor]:
    """The folded model's FFNs, by the names that they have in the file, which has the same ones, narrower."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = int(reader.get_field(f"{architecture}.block_count").contents())
    names = gguf.get_tensor_name_map(kinds[architecture], blocks)
    known = {tensor.name: tensor for tensor in reader.tensors}
    found: dict[str, Tensor] = {}
    for name, tensor in folded.state_dict().items():
        told = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if told is not None and ".ffn_" in told and "norm" not in told:
            found[told] = tensor
    wanted = {name for name in known if ".ffn_" in name and "norm" not in name}
    if not wanted or not wanted <= set(found):
        raise UnsupportedModelError(
            f"gguf: the FFNs of {type(folded).__name__} were not found in the file of a {architecture} model: expected "
            f"{', '.join(sorted(wanted)[:3]) or 'any'}, got {', '.join(sorted(found)[:3]) or 'none'}"
        )
    for name in (name for name in wanted if name.endswith("ffn_down.weight")):
        base = torch.from_numpy(gguf.quants.dequantize(known[name].data, known[name].tensor_type).copy())
        own = found[name].float().cpu()[:, : base.shape[1]]
        if own.shape != base.shape or torch.cosine_similarity(own.flatten(), base.flatten(), dim=0) < _ALIKE:
            raise MismatchError(f"gguf: {name} holds other weights than the folded model: expected the base's own file")
    return found


def _stored(tensor: Tensor, like: Any) -> tuple[np.ndarray[Any, Any], Any]:
    """As the file has it, or as F16 where gguf cannot quantise to that type, or not rows of this length."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    block = gguf.GGML_QUANT_SIZES[like][0]
    kind = (
        like if like in (kinds.F32, kinds.F16, kinds.BF16, kinds.Q8_0) and tensor.shape[-1] % block == 0 else kinds.F16
    )
    return gguf.quants.quantize(np.ascontiguousarray(tensor.float().cpu().numpy()), kind), kind
