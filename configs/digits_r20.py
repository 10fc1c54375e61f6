"""ResNet-20 on scikit-learn's 1,797 scanned digits: the full pipeline on real images, without a download.

    python -m experiments.digits_r20 --config=configs/digits_r20.py --workdir=runs/demo

Two CPU cores: under 5 minutes. The argument is the search, as in configs/cifar10_r56.py.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    """The demonstration."""
    config = default.get_config()
    config.model.name = "resnet20"
    config.data.update(name="digits", pad=1, flip=False)
    config.data.update(search_fraction=0.3, validation_fraction=0.1)
    config.eval_batch_size = 120
    config.base.update(epochs=20, batch_size=64, schedule="cosine", warmup_epochs=1.0, chunk_steps=15)
    config.search.update(epochs=200, batch_size=128, save_every=4)
    config.finetune.update(epochs=10, batch_size=64, schedule="cosine", warmup_epochs=0.0, learning_rate=0.02)
    # Batch statistics of the pruned network instead of those of the unpruned one.
    config.finetune.update(chunk_steps=15, control=True, recalibration_steps=60)
    return default.choose(config, argument, {"ddnp": 0.5}, {}, default.OF_METHOD_IN_FEW_STEPS)
