"""The backbones in plain PyTorch (NCHW), with the published checkpoints' names: the reference implementations.

Inner channel counts are data here too (`widths`, as in `ddnp_jax.models`), so that pruned networks can be compared.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.pytorch_resnet import Block, CifarResNet


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> list[nn.Module]:
    """A convolution without bias, its batch norm, and an activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, norm(outputs), *([activation()] if activation else [])]


class ResidualBlock(nn.Module):
    """A basic block (one inner width) or a bottleneck (two), with a projection where the shape changes."""

    def __init__(self, inputs: int, inner: Sequence[int], outputs: int, stride: int) -> None:
        super().__init__()
        kernels, strides = ((3, 3), (stride, 1)) if len(inner) == 1 else ((1, 3, 1), (1, stride, 1))
        channels = [inputs, *inner, outputs]
        self.depth = len(kernels)
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True)):
            conv, norm = conv_norm(channels[i], channels[i + 1], kernel, step)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", norm)
        projects = stride != 1 or inputs != outputs
        self.downsample = nn.Sequential(*conv_norm(inputs, outputs, 1, stride)) if projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = torch.relu(y) if i < self.depth else y
        return torch.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """torchvision's ResNet (V1) with `blocks` per stage."""

    def __init__(self, blocks: Sequence[int], bottleneck: bool, num_classes: int, widths: Iterator[int] | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(3, 64, 7, 2)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for stage, count in enumerate(blocks):
            planes = 64 * 2**stage
            outputs, inside = (4 * planes, 2) if bottleneck else (planes, 1)
            layers = []
            for i in range(count):
                inner = [next(widths) if widths else planes for _ in range(inside)]
                layers.append(ResidualBlock(inputs, inner, outputs, 2 if stage and i == 0 else 1))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


def mobilenet_v2_rows(strides: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """(inputs, expanded, outputs, stride) of MobileNetV2's blocks."""
    inputs = 32
    for outputs, count, stride in zip((16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1), strides, strict=True):
        for i in range(count):
            yield inputs, inputs * (1 if outputs == 16 else 6), outputs, stride if i == 0 else 1
            inputs = outputs


class InvertedResidual(nn.Module):
    """torchvision's MobileNetV2 block."""

    def __init__(self, inputs: int, expanded: int, outputs: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Sequential(*conv_norm(expanded, expanded, 3, stride, expanded, nn.ReLU6))
        expand = [] if inputs == expanded == 32 else [nn.Sequential(*conv_norm(inputs, expanded, activation=nn.ReLU6))]
        self.conv = nn.Sequential(*expand, depthwise, *conv_norm(expanded, outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2; `widths` of all blocks but the first."""

    def __init__(self, num_classes: int, widths: Iterator[int] | None) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*conv_norm(3, 32, 3, 2, activation=nn.ReLU6))]
        for inputs, expanded, outputs, stride in mobilenet_v2_rows((1, 2, 2, 2, 1, 2, 1)):
            width = next(widths) if widths and len(layers) > 1 else expanded
            layers.append(InvertedResidual(inputs, width, outputs, stride))
        self.features = nn.Sequential(*layers, nn.Sequential(*conv_norm(320, 1280, activation=nn.ReLU6)))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


class CifarMobileNetV2Block(nn.Module):
    """The DDNP and NPPM authors' MobileNetV2 block."""

    def __init__(self, inputs: int, expanded: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inputs, expanded)
        self.conv2, self.bn2 = conv_norm(expanded, expanded, 3, stride, expanded)
        self.conv3, self.bn3 = conv_norm(expanded, outputs)
        self.stride = stride
        self.shortcut = nn.Sequential(*(conv_norm(inputs, outputs) if stride == 1 and inputs != outputs else []))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self.stride == 1 else y


class CifarMobileNetV2(nn.Module):
    """The DDNP and NPPM authors' MobileNetV2 for small images."""

    def __init__(
        self, num_classes: int, widths: Iterator[int] | None, strides: Sequence[int] = (1, 1, 1, 2, 1, 2, 1)
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(3, 32, 3)
        self.layers = nn.Sequential(
            *(
                CifarMobileNetV2Block(inputs, next(widths) if widths else expanded, outputs, stride)
                for inputs, expanded, outputs, stride in mobilenet_v2_rows(strides)
            )
        )
        self.conv2, self.bn2 = conv_norm(320, 1280)
        self.linear = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits."""
        x = self.layers(torch.relu(self.bn1(self.conv1(x))))
        return self.linear(torch.relu(self.bn2(self.conv2(x))).mean(dim=(2, 3)))


class SqueezeExcite(nn.Module):
    """torchvision's squeeze-excite with a hard sigmoid."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scales the channels of (N, C, H, W)."""
        scale = self.fc2(torch.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * nn.functional.hardsigmoid(scale)


V3_NORM = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class MobileNetV3Block(nn.Module):
    """torchvision's MobileNetV3 block; `squeezed` 0 for none, `expands` False for a first block."""

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        kernel: int,
        stride: int,
        squeezed: int,
        activation: type[nn.Module],
        expands: bool,
    ) -> None:
        super().__init__()
        layers = [nn.Sequential(*conv_norm(inputs, width, activation=activation, norm=V3_NORM))] if expands else []
        layers.append(nn.Sequential(*conv_norm(width, width, kernel, stride, width, activation, norm=V3_NORM)))
        layers += [SqueezeExcite(width, squeezed)] if squeezed else []
        self.block = nn.Sequential(*layers, nn.Sequential(*conv_norm(width, outputs, norm=V3_NORM)))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return x + self.block(x) if self.adds else self.block(x)


class MobileNetV3Small(nn.Module):
    """torchvision's MobileNetV3-small; `widths` of all blocks but the first."""

    EXPANDED = (16, 72, 88, 96, 240, 240, 120, 144, 288, 576, 576)
    OUTPUTS = (16, 24, 24, 40, 40, 40, 48, 48, 96, 96, 96)
    SQUEEZED = (8, 0, 0, 24, 64, 64, 32, 40, 72, 144, 144)

    def __init__(self, num_classes: int, widths: Iterator[int] | None) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*conv_norm(3, 16, 3, 2, activation=nn.Hardswish, norm=V3_NORM))]
        inputs = 16
        for i, (width, outputs, squeezed) in enumerate(zip(self.EXPANDED, self.OUTPUTS, self.SQUEEZED, strict=True)):
            width = next(widths) if widths and i else width
            kernel, activation = (3, nn.ReLU) if i < 3 else (5, nn.Hardswish)
            stride = 2 if i in (0, 1, 3, 8) else 1
            layers.append(MobileNetV3Block(inputs, width, outputs, kernel, stride, squeezed, activation, i > 0))
            inputs = outputs
        layers.append(nn.Sequential(*conv_norm(96, 576, activation=nn.Hardswish, norm=V3_NORM)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(576, 1024), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1024, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


class SameConv2d(nn.Conv2d):
    """A convolution without bias that is padded as TensorFlow's 'SAME' is."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        missing = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            pixels = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            missing += [pixels // 2, pixels - pixels // 2]
        return super().forward(nn.functional.pad(x, missing))


LITE_NORM = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class EfficientNetLiteBlock(nn.Module):
    """EfficientNet-Lite's block; `expands` False for the first one."""

    def __init__(self, inputs: int, width: int, outputs: int, kernel: int, stride: int, expands: bool) -> None:
        super().__init__()
        if expands:
            self._expand_conv, self._bn0 = SameConv2d(inputs, width, 1), LITE_NORM(width)
        self._depthwise_conv, self._bn1 = SameConv2d(width, width, kernel, stride, width), LITE_NORM(width)
        self._project_conv, self._bn2 = SameConv2d(width, outputs, 1), LITE_NORM(outputs)
        self.expands, self.adds = expands, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        y = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._bn2(self._project_conv(nn.functional.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 under the names of `efficientnet-lite-pytorch`; `widths` of all blocks but the first."""

    KERNELS, STRIDES = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1)
    OUTPUTS, BLOCKS = (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)

    def __init__(self, num_classes: int, widths: Iterator[int] | None) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2), LITE_NORM(32)
        blocks: list[nn.Module] = []
        inputs = 32
        for kernel, stride, outputs, count in zip(self.KERNELS, self.STRIDES, self.OUTPUTS, self.BLOCKS, strict=True):
            for i in range(count):
                width = (next(widths) if widths else 6 * inputs) if blocks else inputs
                block = EfficientNetLiteBlock(inputs, width, outputs, kernel, 1 if i else stride, bool(blocks))
                blocks.append(block)
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = SameConv2d(inputs, 1280, 1), LITE_NORM(1280)
        self._fc = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits."""
        x = self._blocks(nn.functional.relu6(self._bn0(self._conv_stem(x))))
        return self._fc(nn.functional.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3)))


class ShuffleSqueezeExcite(nn.Module):
    """Megvii's squeeze-excite with batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeeze = conv_norm(channels, channels // 4, activation=nn.ReLU)
        self.SE_opr = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), *squeeze, nn.Conv2d(channels // 4, channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scales the channels of (N, C, H, W)."""
        return x * nn.functional.hardsigmoid(self.SE_opr(x))


class ShuffleUnit(nn.Module):
    """A unit of ShuffleNetV2+; `kernel` 0 is the Xception-like one."""

    def __init__(self, inputs: int, inner: Sequence[int], outputs: int, kernel: int, stride: int, stage: int) -> None:
        super().__init__()
        activation = nn.ReLU if stage == 0 else nn.Hardswish
        half = inputs if stride == 2 else inputs // 2
        made = outputs - half
        main = []
        if kernel == 0:
            for a, b in ((half, inner[0]), (inner[0], inner[1]), (inner[1], made)):
                main += [*conv_norm(a, a, 3, 1, a), *conv_norm(a, b, activation=activation)]
        else:
            (width,) = inner
            main += conv_norm(half, width, activation=activation)
            main += conv_norm(width, width, kernel, stride, width)
            main += conv_norm(width, made, activation=activation)
        self.branch_main = nn.Sequential(*main, *([ShuffleSqueezeExcite(made)] if stage >= 2 else []))
        if stride == 2:
            project = conv_norm(half, half, activation=activation)
            self.branch_proj = nn.Sequential(*conv_norm(half, half, kernel, 2, half), *project)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], dim=1)
        passed, x = x.unflatten(1, (-1, 2)).unbind(dim=2)
        return torch.cat([passed, self.branch_main(x)], dim=1)


class ShuffleNetV2Plus(nn.Module):
    """Megvii's ShuffleNetV2+ with `stages` output channels; AvgPool2d(7) is a mean here, for images of any size."""

    KERNELS = ("3305", "5533", "73755373", "7507")

    def __init__(self, stages: Sequence[int], num_classes: int, widths: Iterator[int] | None) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*conv_norm(3, 16, 3, 2, activation=nn.Hardswish))
        units, inputs = [], 16
        for stage, (outputs, kernels) in enumerate(zip(stages, self.KERNELS, strict=True)):
            for i, kernel in enumerate(map(int, kernels)):
                inner = [next(widths) if widths else outputs // 2 for _ in range(1 if kernel else 2)]
                units.append(ShuffleUnit(inputs, inner, outputs, kernel, 2 if i == 0 else 1, stage))
                inputs = outputs
        self.features = nn.Sequential(*units)
        self.conv_last = nn.Sequential(*conv_norm(inputs, 1280, activation=nn.Hardswish))
        self.LastSE = ShuffleSqueezeExcite(1280)
        self.fc = nn.Sequential(nn.Linear(1280, 1280, bias=False), nn.Hardswish())
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits."""
        x = self.conv_last(self.features(self.first_conv(x))).mean(dim=(2, 3), keepdim=True)
        return self.classifier(self.dropout(self.fc(self.LastSE(x).flatten(1))))


RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}
SHUFFLENETS = {
    "shufflenet_v2_plus_small": (36, 104, 208, 416),
    "shufflenet_v2_plus_medium": (48, 128, 256, 512),
    "shufflenet_v2_plus_large": (68, 168, 336, 672),
}
OTHERS = {
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v2_cifar": CifarMobileNetV2,
    "mobilenet_v3_small": MobileNetV3Small,
    "efficientnet_lite0": EfficientNetLite0,
}


def create(
    name: str, num_classes: int, widths: Sequence[int] | None = None, channels: int = 3, **attributes: Any
) -> nn.Module:
    """Builds a backbone for images of `channels` channels; the other arguments as for `ddnp_jax.models.create`.

    Raises:
      ValueError: The name is unknown.
    """
    module = _create(name, num_classes, widths, attributes)
    if channels != 3:
        stem = next(each for each in module.modules() if isinstance(each, nn.Conv2d))
        stem.in_channels = channels
        stem.weight = nn.Parameter(stem.weight.new_empty(stem.out_channels, channels, *stem.kernel_size))
        stem.reset_parameters()
    return module


def _create(name: str, num_classes: int, widths: Sequence[int] | None, attributes: dict[str, Any]) -> nn.Module:
    remaining = iter(widths) if widths is not None else None
    if name in RESNETS:
        return ResNet(*RESNETS[name], num_classes, remaining, **attributes)
    if name in SHUFFLENETS:
        return ShuffleNetV2Plus(SHUFFLENETS[name], num_classes, remaining, **attributes)
    if name in OTHERS:
        return OTHERS[name](num_classes, remaining, **attributes)
    if name.removeprefix("resnet") in ("20", "32", "44", "56", "110"):
        arguments = {"shortcut": "subsample", **attributes}
        return CifarResNet(int(name.removeprefix("resnet")), widths=widths, num_classes=num_classes, **arguments)
    raise ValueError(f"model {name!r} has no PyTorch form here.")


def masked_layers(model: nn.Module) -> list[nn.Module]:
    """The convolutions that read what a gate has masked, in the order of the gates."""
    return [layer for block in model.modules() for layer in _masked_layers(block)]


def _masked_layers(block: nn.Module) -> list[nn.Module]:
    match block:
        case Block():
            return [block.conv2]
        case ResidualBlock():
            return [getattr(block, f"conv{i}") for i in range(2, block.depth + 1)]
        case InvertedResidual():
            return [block.conv[-2]] if len(block.conv) == 4 else []  # the first block has nothing to expand
    return []


def mask_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, layers: Sequence[nn.Module], masks: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """What the backbone contributes to a search step: the gradients of the mean cross-entropy to the masks alone.

    Args:
      model: Frozen (`requires_grad_(False)`) and in evaluation mode.
      images: (N, 3, H, W).
      labels: (N,).
      layers: `masked_layers` of the model.
      masks: (channels,) for what each of them reads, leaves that require gradients.
    """

    def masked(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        return lambda _, read: (read[0] * mask[:, None, None],)

    hooks = [layer.register_forward_pre_hook(masked(mask)) for layer, mask in zip(layers, masks, strict=True)]
    try:
        return torch.autograd.grad(F.cross_entropy(model(images), labels), masks)
    finally:
        for hook in hooks:
            hook.remove()
