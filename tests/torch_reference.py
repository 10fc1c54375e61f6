"""CIFAR ResNets in plain PyTorch (NCHW): the independent truth that the flax networks are compared with."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, inner, outputs, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsamples = stride != 1
        self.shortcut = shortcut
        self.added = outputs - inputs

    def identity(self, x):
        if not self.downsamples:
            return x
        n, _, h, w = x.shape
        if self.shortcut == "subsample":
            half = x.new_zeros(n, self.added // 2, h // 2, w // 2)
            return torch.cat([half, x[:, :, 0::2, 0::2], half], dim=1)
        assert self.shortcut == "avgpool"
        return torch.cat([F.avg_pool2d(x, 2), x.new_zeros(n, self.added, h // 2, w // 2)], dim=1)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.identity(x))


class CifarResNet(nn.Module):
    """`widths`: inner channels of each block; `classifier`: the name of the last layer in the state dict."""

    def __init__(self, depth, shortcut, widths=None, num_classes=10, classifier="linear"):
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

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.classifier)(x.mean(dim=(2, 3)))


def randomize(model, seed):
    """Random weights and batch-norm statistics for which the logits stay of the order of one; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

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
    return model.eval()
