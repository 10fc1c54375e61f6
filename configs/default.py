"""Every field of an experiment, with the values that most experiments share. Configurations start from this one."""

from ml_collections import ConfigDict


def trainer(**fields: object) -> ConfigDict:
    """A section of the trainer, used for base training and for fine-tuning."""
    config = ConfigDict()
    config.epochs = 200  # passes over the stage's training images
    config.batch_size = 128  # images per step, over all devices
    config.learning_rate = 0.1  # of SGD, for this batch size
    config.momentum = 0.9  # of SGD
    config.weight_decay = 1e-4  # added to the gradient of every parameter
    config.warmup_epochs = 0.0  # linear warm-up from 0
    config.schedule = "step"  # 'step' (x0.1 at decay_at) or 'cosine' (to 0)
    config.decay_at = (0.5, 0.75)  # fractions of the run, for 'step'
    config.label_smoothing = 0.0  # mass that the label gives to all classes
    config.augment = True  # random crops and flips, as `data` says
    config.chunk_steps = 50  # steps per dispatch; logging and stopping happen between chunks
    config.save_every = 8  # chunks between checkpoints and evaluations on held-out training images
    config.update(fields)
    return config


def get_config() -> ConfigDict:
    """The common configuration; `data` and `model` are for the experiment to fill."""
    config = ConfigDict()
    config.seed = 0  # of weights, splits, order, augmentation and search
    config.variant = "default"  # name of this form in reports
    config.precision = "float32"  # of the computation: 'float32' or 'bfloat16'; parameters stay float32
    config.eval_batch_size = 512  # images per evaluation step, over all devices
    config.notes = ()  # sentences that the report repeats

    config.model = ConfigDict()
    config.model.name = "resnet56"  # a name that ddnp_jax.models.create knows
    config.model.attributes = ConfigDict({"shortcut": "subsample"})  # further attributes of the module

    config.data = ConfigDict()
    config.data.name = "cifar10"  # TFDS data set
    config.data.label = "CIFAR-10"  # how reports call it
    config.data.data_dir = ""  # folder of prepared TFDS data; '' is TFDS's own folder and download
    config.data.seed = 0  # draws the held-out splits
    config.data.search_fraction = 0.05  # of the training images: read by the search, held out from base training
    config.data.validation_fraction = 0.02  # of the training images: chooses the best checkpoint, never trained on
    config.data.mean = (0.4914, 0.4822, 0.4465)  # per channel, of images in [0, 1]
    config.data.std = (0.2023, 0.1994, 0.2010)
    config.data.pad = 4  # zero pixels on each side before the random crop of small images
    config.data.flip = True  # random horizontal flip
    config.data.crop_size = 224  # side of the crops that are made of photographs
    config.data.resize_size = 256  # shorter side of a photograph before the center crop of evaluation
    config.data.threads = 0  # that decode photographs, in each process; 0 is one per core

    config.budget = ConfigDict()
    config.budget.p = 0.5  # FLOPs of the prunable layers that remain, in (0, 1]
    config.budget.convention = "macs"  # 'macs' of conv and dense, or 'authors' (3 more per output element)
    config.budget.multiple = 1  # widths are multiples of this (whole gates excepted)

    config.base = trainer(weights="")  # weights: PyTorch checkpoint or save_pruned folder; '' trains from scratch

    config.search = search = ConfigDict()
    search.method = "ddnp"  # a module of ddnp_jax.methods
    search.epochs = 200  # passes over the search images
    search.batch_size = 256  # images per step, over all devices
    search.augment = False  # random crops and flips, as `data` says
    search.chunk_steps = 10  # steps per dispatch
    search.save_every = 10  # chunks between checkpoints and evaluations
    search.importance = "generator"  # s: 'generator' (g_s), 'scalar' per channel, or 'l1' (norms, fixed)
    search.width = "generator"  # k: 'generator' (g_k), 'scalar' per gate, or 'half' (0.5, fixed)
    search.output = "sigmoid"  # importance from s̄: 'sigmoid', 'abs' or 'square'
    search.learned_inputs = False  # whether x_s and x_k are learned
    search.bidirectional = False  # authors' form: g_s also runs backward over the gates
    search.layer_norm = False  # authors' form: layer norm of the GRU's outputs
    search.energy_weight = 0.0  # authors' form 0.5: share of feature energy in the importance
    search.importance_average = 0.0  # authors' form 0.99: decay of the average that ranks channels for evaluation
    search.resource_loss = "log_abs"  # R: 'log_abs', 'log_max', 'abs' or 'square'
    search.resource_weight = 4.0  # λ
    search.tie_weight = 1.0  # ρ; 0 disentangles importance and width completely
    search.tie_noise = 0.02  # half the range of u
    search.band = 0.05  # half-width of the soft top-k's edge, as a fraction of the channels
    search.floor = 0.025  # smallest mask during the search
    search.importance_optimizer = ConfigDict({"learning_rate": 1e-3, "weight_decay": 1e-4})  # AdamW; scalars need ~5e-2
    search.width_optimizer = ConfigDict({"learning_rate": 1e-3, "weight_decay": 0.0})  # AdamW, cosine to 0

    config.finetune = trainer(warmup_epochs=5.0)
    config.finetune.distillation_weight = 0.0  # share of the loss from the unpruned network's outputs
    config.finetune.distillation_temperature = 4.0  # of those outputs
    config.finetune.recalibration_steps = 0  # batches that re-estimate batch statistics before fine-tuning

    config.parallel = ConfigDict()
    config.parallel.mode = "shard_map"  # or 'pmap'; the same numbers
    config.parallel.sync_batch_norm = (
        True  # batch statistics of the whole batch; models without bn_axis_name: per device
    )
    return config
