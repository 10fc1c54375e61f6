"""Optional dependencies: the extras of setup.cfg."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed_by(what: str, extra: str = "job") -> Iterator[None]:
    """A context that turns the ImportError of a missing package into a one-sentence message.

    Args:
      what: What needs the packages that are imported.
      extra: The extra that installs them.

    Raises:
      ModuleNotFoundError: A package is missing; it and the command that installs it are named.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "ddnp_jax"):  # already reported, or this library itself is broken
            raise
        raise ModuleNotFoundError(f"{what} needs {package}; run `pip install ddnp_jax[{extra}]`.") from error
