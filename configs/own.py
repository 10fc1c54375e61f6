"""Your own network and images: a folder with one folder per class, and a network given as MODULE:NAME.

    python -m experiments.own --config.model.name=mine:Network --config.data.data_dir=photographs --workdir=runs/mine

The argument is the search, as in configs/cifar10_r56.py; `tiny` takes one epoch of every stage. What photographs of
other sizes, few images and short trainings need is in docs/guide/images.md.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    """ResNet-50 on photographs at 224 pixels, unless other fields are given; sizes of batches are for a laptop."""
    config = default.get_config()
    config.model.name = "resnet50"
    config.model.attributes = ConfigDict()
    config.data.update(name="folder", search_fraction=0.3, validation_fraction=0.1)
    config.eval_batch_size = 32
    config.base.update(epochs=30, batch_size=32, schedule="cosine", warmup_epochs=1.0, learning_rate=0.02)
    config.search.update(epochs=200, batch_size=32)
    config.finetune.update(epochs=20, batch_size=32, schedule="cosine", warmup_epochs=1.0, learning_rate=0.02)
    for stage in (config.base, config.search, config.finetune):
        stage.chunk_steps = 10
    forms = {"tiny": default.SHORT}
    return default.choose(config, argument, {"ddnp": 0.5}, forms, default.OF_METHOD_IN_FEW_STEPS)
