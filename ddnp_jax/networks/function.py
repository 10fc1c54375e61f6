"""Plain functions `(variables, images) -> outputs` as networks, for Equinox, Haiku, or custom code."""

from typing import Any

import jax
import jax.numpy as jnp

from ddnp_jax.networks.base import LeafPath, Network, Resizing, Sizes


class FunctionNetwork(Network):
    """A function that accepts variables of any size; training and evaluation mode are the same."""

    kind = "function"

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.model, "__name__", type(self.model).__name__)

    def variables(self, given: Any) -> Any:
        """The variables that were given."""
        if given is None:
            raise ValueError(f"{self.name} is a function, which holds no variables; give variables=.")
        return given

    def initial(self, rng: jax.Array, images: Any) -> Any:
        """Raises an error, because a function cannot initialize variables."""
        return self.variables(None)

    def evaluate(self, variables: Any, images: jax.Array) -> Any:
        """The outputs of the function."""
        return self.model(variables, images, **self._call_kwargs)

    def train(
        self, variables: Any, images: jax.Array, rng: jax.Array, batch_axis: str | None = None
    ) -> tuple[Any, Any]:
        """As `evaluate`."""
        del rng, batch_axis
        return self.evaluate(variables, images), variables

    def split(self, variables: Any) -> tuple[Any, Any]:
        """Splits variables into floating-point leaves and all others."""
        leaves, tree = jax.tree.flatten(variables)
        learned = [jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact) for leaf in leaves]
        parts = [
            [leaf if keep == wanted else None for leaf, keep in zip(leaves, learned, strict=True)]
            for wanted in (True, False)
        ]
        return jax.tree.unflatten(tree, parts[0]), jax.tree.unflatten(tree, parts[1])

    def merge(self, parameters: Any, rest: Any) -> Any:
        """The inverse of `split`."""
        return jax.tree.map(lambda a, b: b if a is None else a, parameters, rest, is_leaf=lambda leaf: leaf is None)

    def is_parameter(self, path: LeafPath) -> bool:
        """True for all leaves, except those under "batch_stats": others cannot be recognized as statistics."""
        return "batch_stats" not in path

    def sizes(self, resizing: Resizing, variables: Any, images: Any) -> Sizes:
        """No sizes: the function must accept smaller arrays without changes."""
        return ()

    def with_sizes(self, sizes: Sizes) -> Any:
        """Returns the same function."""
        return self.model

    def saved_sizes(self) -> Sizes:
        """No sizes."""
        return ()
