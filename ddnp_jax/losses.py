"""The terms of the training and search objectives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddnp_jax.networks import Outputs, first_line, picked, structure

RESOURCE = ("log_abs", "log_max", "abs", "square")

Loss = Callable[[Any, Any], jax.Array]  # (outputs, targets) -> scalar, the mean over the images


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Mean cross-entropy of logits (N, K) against integer labels (N,), with label smoothing."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def top1(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Accuracy of logits (N, K) against integer labels (N,), in percent."""
    return 100.0 * jnp.mean(jnp.argmax(logits, -1) == labels)


def check_labels(shape: tuple[int, ...], labels: Any, name: str = "the network", batch: int = 0) -> None:
    """Checks, on the host, that the labels match the logits of the default loss.

    Args:
      shape: Shape of the network's outputs for the batch.
      labels: Labels of the batch.
      name: Name of the network, for messages.
      batch: Number of the batch, for messages.

    Raises:
      ValueError: The outputs are not logits (N, K), or the labels are not integers (N,) in 0..K - 1.
    """
    advice = "if the targets are not classes, give loss=, a function (outputs, targets) -> scalar."
    if len(shape) != 2:
        raise ValueError(f"{name} returns outputs {shape}, which are not logits (N, K); {advice}")
    if not hasattr(labels, "shape") or not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != shape[:1]:
        found = f"{labels.dtype} {labels.shape}" if hasattr(labels, "shape") else type(labels).__name__
        raise ValueError(
            f"the targets of batch {batch} are {found}, and must be whole numbers ({shape[0]},), one label per image; "
            f"{advice}"
        )
    numbers = np.asarray(labels)
    bad = np.flatnonzero((numbers < 0) | (numbers >= shape[1]))
    if bad.size:
        raise ValueError(
            f"label {numbers[bad[0]]} of image {bad[0]} of batch {batch} is outside 0..{shape[1] - 1}, the {shape[1]} "
            f"classes of {name}; give labels from 0, or a network with more outputs."
        )


def check_loss(
    loss: Loss, found: Any, targets: Any, outputs: Outputs = None, name: str = "the network", argument: str = "loss"
) -> None:
    """Checks that a custom loss accepts the outputs of a network; nothing is computed.

    Args:
      loss: Loss `(outputs, targets) -> scalar`.
      found: What the network returns for a batch, or its shapes.
      targets: Targets of the batch.
      outputs: Which of the outputs to use, as in `measure`.
      name: Name of the network, for messages.
      argument: Name of the argument that holds the loss, for messages.

    Raises:
      ValueError: The loss cannot be computed, or is not a floating-point scalar.
    """
    counted = found if outputs is None else jax.eval_shape(lambda found: picked(found, outputs, name), found)
    given = f"the outputs ({structure(counted)}) of {name} and targets ({structure(targets)})"
    try:
        value = jax.eval_shape(loss, counted, targets)
    except Exception as error:  # the loss's own code may raise any error
        raise ValueError(
            f"{argument}= cannot be computed from {given}: {first_line(error)}. It must be a function (outputs, "
            "targets) -> scalar; outputs= selects one of several outputs."
        ) from error
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{argument}= returns {structure(value)} from {given}; it must return one floating-point number, such as "
            "the mean over the images."
        )


def measure(
    found: Any,
    targets: Any,
    loss: Loss | None = None,
    outputs: Outputs = None,
    label_smoothing: float = 0.0,
    name: str = "the network",
) -> dict[str, jax.Array]:
    """Computes the "loss" of a network's outputs and, for the default loss, the "top1" accuracy in percent.

    Args:
      found: What the network returned for a batch.
      targets: Targets of the batch.
      loss: Loss `(outputs, targets) -> scalar`; None for the cross-entropy of logits (N, K) with integer labels (N,).
      outputs: Which of the outputs to use: a key, an index or a function; see `networks.picked`. Without it, a custom
        loss receives everything that the network returned.
      label_smoothing: Label smoothing of the default loss.
      name: Name of the network, for messages.
    """
    if loss is not None:
        return {"loss": loss(found if outputs is None else picked(found, outputs, name), targets)}
    logits = picked(found, outputs, name).astype(jnp.float32)
    return {"loss": cross_entropy(logits, targets, label_smoothing), "top1": top1(logits, targets)}


def distillation(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Knowledge distillation (Hinton et al. 2015): T² KL(teacher || student) of softened outputs, mean over N."""
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    student = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * jnp.mean(optax.losses.kl_divergence_with_log_targets(student, teacher))


def resource(kind: str, cost: jax.Array, total: float, p: float) -> jax.Array:
    """Resource loss R(T, p T_total): how far the current cost T is from the target p T_total.

    Args:
      kind: 'log_abs' |log(T / p T_total)| (the authors' DDNP form), 'log_max' log(max(T, p T_total) / p T_total) (their
        NPPM form), 'abs' |T / T_total - p| or 'square' (T / T_total - p)².
      cost: T, in the unit of `total`.
      total: T_total, the cost of the unpruned network.
      p: Fraction of the cost to keep.
    """
    target = p * total
    match kind:
        case "log_abs":
            return jnp.abs(jnp.log(cost / target))
        case "log_max":
            return jnp.log(jnp.maximum(cost, target) / target)
        case "abs":
            return jnp.abs(cost / total - p)
        case "square":
            return jnp.square(cost / total - p)
    raise ValueError(f"resource_loss={kind!r} is unknown; use one of {', '.join(RESOURCE)}.")


def tie(gates: tuple[jax.Array, ...], k: jax.Array, rng: jax.Array, noise: float = 0.02) -> jax.Array:
    """Relaxed tie between importance and width, the third term of DDNP eq. (9).

    `Σ_l log(|mean_c 1[gate_lc >= 1/2] - k_l + u_l| + 1)` with u ~ U(-noise, noise). The fraction of open channels has
    no gradient, so that the tie changes only the widths.

    Args:
      gates: Relaxed Bernoulli values (C_l,) per gate.
      k: Widths (L,) in (0, 1).
      rng: Random key for u.
      noise: Half the range of u.
    """
    is_open = jnp.stack([jnp.mean((gate >= 0.5).astype(jnp.float32)) for gate in gates])
    u = jax.random.uniform(rng, k.shape, minval=-noise, maxval=noise)
    return jnp.sum(jnp.log(jnp.abs(jax.lax.stop_gradient(is_open) - k + u) + 1.0))
