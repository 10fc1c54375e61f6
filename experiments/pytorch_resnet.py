"""CIFAR ResNets in plain PyTorch (NCHW): the reference of the tests and of the benchmark."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters, 'subsample' or 'avgpool'."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsamples = stride != 1
        self.shortcut = shortcut
        self.added = outputs - inputs

    def identity(self, x: Tensor) -> Tensor:
        """The shortcut."""
        if not self.downsamples:
            return x
        n, _, h, w = x.shape
        if self.shortcut == "subsample":
            half = x.new_zeros(n, self.added // 2, h // 2, w // 2)
            return torch.cat([half, x[:, :, 0::2, 0::2], half], dim=1)
        assert self.shortcut == "avgpool"
        return torch.cat([F.avg_pool2d(x, 2), x.new_zeros(n, self.added, h // 2, w // 2)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.identity(x))


class CifarResNet(nn.Module):
    """ResNet-`depth`; `widths`: inner channels of each block; `classifier`: the last layer's name in the state dict."""

    def __init__(
        self,
        depth: int,
        shortcut: str,
        widths: Sequence[int] | None = None,
        num_classes: int = 10,
        classifier: str = "linear",
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        inner = iter(widths or [16] * blocks + [32] * blocks + [64] * blocks)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (inputs, outputs) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            first = Block(inputs, next(inner), outputs, 1 if stage == 1 else 2, shortcut)
            rest = [Block(outputs, next(inner), outputs, 1, shortcut) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.classifier = classifier
        self.add_module(classifier, nn.Linear(64, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.classifier)(x.mean(dim=(2, 3)))


def randomize(model: nn.Module, seed: int, images: Tensor | None = None) -> nn.Module:
    """Random weights and batch-norm statistics for which the logits stay of the order of one; evaluation mode.

    Args:
      model: Is changed in place.
      seed: Seed of the numbers.
      images: (N, 3, H, W); with them the statistics are drawn around those of the images, without which the signal
        fades in networks that have many layers outside residual branches.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> Tensor:
        return tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.5, 0.5)
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 2.0)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                bound = (2 / module.weight[0].numel()) ** 0.5
                uniform(module.weight, -bound, bound)
                if module.bias is not None:
                    uniform(module.bias, -1.0, 1.0)
        if images is not None:
            norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
            means, factors = (
                [getattr(norm, name).clone() for norm in norms] for name in ("running_mean", "running_var")
            )
            paces = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0  # the statistics become those of the next batch
            model.train()(images)
            for norm, mean, factor, pace in zip(norms, means, factors, paces, strict=True):
                norm.momentum = pace
                norm.running_mean += mean * norm.running_var.sqrt()
                least = 0.1 * norm.running_var.mean()  # a channel may have been the same all over the batch
                norm.running_var.mul_(factor).add_(least)
    return model.eval()
