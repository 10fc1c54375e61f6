"""Settings shared by the ImageNet experiments; each defines its network, its budgets and its trainer.

Known of the authors' runs: the budgets (DDNP Table A1, NPPM Table 1), that they started from trained networks
(ResNet-50: torchvision's first checkpoint), and the search's optimizers, λ and ρ of their CIFAR-10 runs, which
are kept here. The rest is ours:

- The search reads 2.5 % of the training images (NPPM: 10 %, as on CIFAR-10) for 20 epochs: 2,500 steps of 256 images, a
  few more than the 2,000 of the CIFAR-10 run.
- 1 % of the training images select the best checkpoint and are never trained on.
- 1,024 images per step, a step that 8 devices share, with 5 epochs of warm-up; ResNets with the learning rate 0.1 per
  256 images (Goyal et al. 2017), mobile networks with half of it. On smaller devices
  `--config.finetune.micro_batches=4` needs a quarter of the memory.
- `RESNET` and `MOBILE` below.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import default
from ddnp_jax import methods

# The recipe by which torchvision's checkpoints were trained, a little longer.
RESNET = {"epochs": 100, "learning_rate": 0.4, "decay_at": (0.3, 0.6, 0.9), "weight_decay": 1e-4}
# Small networks are not regularized much; the cosine needs no boundaries to be chosen.
MOBILE = {"epochs": 150, "learning_rate": 0.2, "schedule": "cosine", "weight_decay": 4e-5}

# Scores of images take 640 of them, as HRank's and CHIP's authors do (5 batches of 128), not the 32,000 of a search.
SCORES = {
    name: {"search.images": 640, "search.batch_size": 128}
    for name, method in methods.METHODS.items()
    if method.passes and method.steps
}

# At 64 pixels.
TINY = {
    **default.SHORT,
    "data.train_split": "train[:500]",
    "data.crop_size": 64,
    "data.resize_size": 72,
    "data.search_fraction": 0.25,
    "data.validation_fraction": 0.1,
    "eval_batch_size": 40,
    **{f"{stage}.batch_size": 32 for stage in ("base", "search", "finetune")},
    **{f"{stage}.learning_rate": 0.02 for stage in ("base", "finetune")},
}


def get_config(
    model: str,
    trainer: Mapping[str, Any],
    p: Mapping[str, float],
    argument: str,
    forms: Mapping[str, Mapping[str, Any]] | None = None,
) -> ConfigDict:
    """An experiment on ImageNet.

    Args:
      model: Name of the network.
      trainer: Fields of base training and of fine-tuning.
      p: Budgets by method.
      argument: Argument of the configuration.
      forms: Further forms of the experiment beside `tiny`.
    """
    config = default.get_config()
    config.model.name = model
    config.model.attributes = ConfigDict()
    config.data.update(name="imagenet2012", search_fraction=0.025, validation_fraction=0.01)
    for section in (config.base, config.finetune):
        section.update(batch_size=1024, warmup_epochs=5.0, chunk_steps=10, save_every=250, **trainer)
    config.search.update(epochs=20, batch_size=256, chunk_steps=10, save_every=25)
    config.eval_batch_size = 1024
    return default.choose(config, argument, p, {"tiny": TINY, **(forms or {})}, {**default.OF_METHOD, **SCORES})
