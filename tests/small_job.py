"""A job on scanned digits that takes seconds, and how a test ends it early; also for the processes that tests start."""

import flax.linen as nn

from configs import digits_r20
from ddnp_jax.training import loop

P = 0.5


def tiny(data_dir, argument=""):
    """The demonstration with few steps, for a ResNet-8 or the network that is given to the job."""
    config = digits_r20.get_config(argument)
    with config.unlocked():
        config.model.attributes.blocks_per_stage = 1  # has every kind of block, and compiles in a third of the time
    config.data.data_dir = data_dir
    config.data.search_fraction = 0.6  # few training images: the base takes 4 steps
    config.base.update(epochs=1, warmup_epochs=0.5, batch_size=128, chunk_steps=1, save_every=2)
    config.search.update(epochs=1, batch_size=256, chunk_steps=1, save_every=2)
    config.finetune.update(epochs=1, batch_size=256, chunk_steps=2, save_every=1, distillation_weight=0.5)
    config.finetune.update(control=False, recalibration_steps=0)
    config.budget.p = P
    return config


class Own(nn.Module):
    """A user's network that knows nothing of this library."""

    channels: tuple

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.channels[0], (3, 3), strides=2, name="first")(x)
        x = nn.relu(nn.BatchNorm(not train, name="norm")(x))
        return nn.Dense(10, name="classes")(
            nn.relu(nn.Conv(self.channels[1], (3, 3), strides=2, name="second")(x)).mean((1, 2))
        )


def interrupt_at(monkeypatch, section, step, action):
    """Calls `action` before the stage takes `step`."""
    fit_stage = loop.fit_stage

    def run_with_end(stage, chunk, *args):
        def chunk_with_end(state, *batches):
            if (stage.name, int(state.step)) == (section, step):
                action()
            return chunk(state, *batches)

        return fit_stage(stage, chunk_with_end, *args)

    monkeypatch.setattr(loop, "fit_stage", run_with_end)
