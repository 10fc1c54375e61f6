"""The command line that all experiments share."""

import argparse
import contextlib
import math
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from logging import LogRecord
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

if TYPE_CHECKING:
    from ddnp_jax.relay import Relay

CHECKOUT = Path(__file__).parents[1]
_CONFIG_FLAGS = ("--config", "-config")
_READ_HERE = ("eval_batch_size", "base", "search", "finetune", "parallel")  # fields of the configuration used below
_CACHED_FROM = 0.2  # programs that take at least this many seconds to compile are cached; JAX's default is 1
_INTERRUPTED = 130  # exit code of an interrupted shell command
_REQUIRED = {"workdir": "give the folder of the run", "torch_checkpoint": "give a file of PyTorch weights"}

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command resumes an unfinished run in it.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Whether several processes share the run.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0, unless JAX finds it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, unless JAX finds it.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, unless JAX finds it.")


def configure(config: ConfigDict, processes: int = 1) -> None:
    """Configures JAX for CPUs and with a compilation cache; must be called before JAX initializes its devices.

    Args:
      config: Configuration, with the batch sizes and `parallel.cpu_fusions`.
      processes: Number of processes that share each batch, with as many devices each.

    Raises:
      ValueError: A fusion is unknown.
    """
    import jax

    from ddnp_jax import cpu, files

    try:
        cpu.configure_cpu(cpu_devices(config, processes), config.parallel.cpu_fusions)
    except ValueError as error:
        raise ValueError(f"parallel.cpu_{error}") from error
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(files.user_cache() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHED_FROM)


def cpu_devices(config: ConfigDict, processes: int = 1) -> int:
    """Returns the best number of devices on a CPU; arguments as for `configure`.

    Every core is a device, as far as the batches can be divided, because XLA:CPU uses several cores better this way
    than within a single operation.
    """
    from ddnp_jax import cpu

    sections = (config.base, config.search, config.finetune)
    batches = (config.eval_batch_size, *(s.batch_size // max(s.get("micro_batches", 1), 1) for s in sections))
    return max((n for n in range(1, cpu.cores() + 1) if math.gcd(*batches) % (n * processes) == 0), default=1)


@contextlib.contextmanager
def _known_fields() -> Iterator[None]:
    """Reports a misspelled --config.FIELD, for which ml_collections raises when the flag is defined or parsed."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        if getattr(error, "name", None) == "get_config":
            raise SystemExit("error: --config names a file without get_config(); copy one of configs/.") from error
        name = re.search(r"[\w.]+", str(error.args[0]))[0]
        close = re.search(r'Did you mean "(\w+)"', str(error.args[0]))
        advice = f"did you mean {close[1]!r}?" if close else "docs/fields.md lists all fields."
        raise SystemExit(f"error: --config has no field {name!r}; {advice}") from error


def _located(config: str) -> str:
    """Locates a configuration file path[:argument], relative to the current folder or else to the checkout."""
    path, colon, argument = config.partition(":")
    for file in (Path(path), CHECKOUT / path):
        if file.is_file():
            _check_python(file)
            return f"{file}{colon}{argument}"
    raise SystemExit(
        f"error: --config={path} is not a file, here or in {CHECKOUT}; see configs/ for the available files."
    )


def _check_python(file: Path) -> None:
    try:
        compile(file.read_bytes(), file, "exec")
    except (SyntaxError, ValueError) as error:  # ValueError for null bytes
        raise SystemExit(
            f"error: --config={file} is not valid Python ({error}); repair it, or copy one of configs/."
        ) from error


def _check_sections(config: Any) -> None:
    """Checks that a configuration has the sections of an experiment; their fields are checked where they are used."""
    found = config.keys() if isinstance(config, ConfigDict) else ()
    if missing := [name for name in _READ_HERE if name not in found]:
        raise ValueError(f"the configuration of --config has no {missing[0]!r}; start from that of configs/default.py.")


def _with_located_config(arguments: Sequence[str]) -> Iterator[str]:
    before = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if before in _CONFIG_FLAGS:
            argument = _located(argument)
        elif name in _CONFIG_FLAGS and equals:
            argument = f"{name}={_located(value)}"
        yield argument
        before = argument


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        with _known_fields():
            found = flags.FLAGS(list(_with_located_config(arguments)))
    except flags.Error as error:
        raise SystemExit(f"error: {_sentence(str(error))}") from error
    except ImportError as error:
        raise SystemExit(f"error: the file of --config cannot import a module ({error}).") from error
    if len(found) > 1:
        raise SystemExit(
            f"error: {found[1]!r} is not a flag; give fields as --config.FIELD=VALUE, --help lists the others."
        )
    return found


def _sentence(message: str) -> str:
    """Shortens the message of a flag's error; a ValueError of a configuration file is shown without its traceback."""
    if missing := re.fullmatch(r"flag --(\w+)=None: .*must have a value other than None\.", message):
        return f"--{missing[1]} is missing; {_REQUIRED[missing[1]]}."
    if boolean := re.fullmatch(r"flag (--[\w.]+=.*): \('Non-boolean argument to boolean flag', .*\)", message):
        return f"flag {boolean[1]} must be True or False."
    own = message.strip().rpartition("\n")[2].strip()
    if own.startswith("TypeError: get_config() takes 0 positional arguments"):
        return "the file of --config takes no argument; leave out the colon and what follows it."
    return own.removeprefix("ValueError: ") if "Traceback" in message and own.startswith("ValueError: ") else message


def with_arguments(words: str) -> ConfigDict:
    """Returns the configuration of --config with additional arguments, and with the same --config.FIELD=VALUE.

    Fields of a search method are left out where the arguments choose another method, which does not have them.

    Args:
      words: Arguments, separated by commas, which are added to those of --config; a search replaces that of --config.

    Raises:
      ValueError: An argument is unknown.
    """
    from configs.default import SEARCHES

    holder = flags.FLAGS["config"]
    path, _, argument = config_flags.get_config_filename(holder).partition(":")
    added, given = words.split(","), argument.split(",")
    if not SEARCHES.keys().isdisjoint(added):
        given = [word for word in given if word not in SEARCHES]
    config = runpy.run_path(path)["get_config"](",".join(filter(None, (*given, *added))))
    values = config_flags.get_override_values(holder)
    config.update_from_flattened_dict({name: value for name, value in values.items() if has_field(config, name)})
    return config


def set_fields() -> list[str]:
    """Names of the fields that --config.FIELD=VALUE sets."""
    return list(config_flags.get_override_values(flags.FLAGS["config"]))


def has_field(config: ConfigDict, name: str) -> bool:
    """Whether a configuration has a field, written as 'a.b'."""
    section, _, rest = name.partition(".")
    return section in config and (not rest or has_field(config[section], rest))


def prune(config: ConfigDict, workdir: str) -> str:
    """Runs the pipeline; returns its last line of output."""
    from ddnp_jax import pipeline

    report = pipeline.run(config, workdir)
    others = f"base {report['base_top1']:.2f} %"
    if report["control_top1"] is not None:
        others += f", fine-tuned in the same way {report['control_top1']:.2f} %"
    return f"{report['pruned_top1']:.2f} % ({others}); report: {workdir}/report.html"


def run(
    default_config: str,
    job: Callable[[ConfigDict, str], str] = prune,
    required: Sequence[str] = ("workdir",),
) -> None:
    """Runs a job with --config (by default `default_config`) in --workdir, and prints the text that it returns.

    Args:
      default_config: Path[:argument] of the configuration file.
      job: (configuration, workdir) -> text.
      required: Names of the flags that the job needs.

    Raises:
      SystemExit: With code 75 if the run was stopped and can be resumed (`ddnp_jax.preemption`), 130 if it was
        interrupted immediately, and 1 with a message for invalid input.
    """
    with _interruptible(), _known_fields():
        config = config_flags.DEFINE_config_file(
            "config", _located(default_config), "Configuration file, path[:argument], from here or from the checkout."
        )
    flags.mark_flags_as_required(required)

    def main(_: list[str]) -> None:
        if _WORKDIR.value == "":
            raise SystemExit("error: --workdir is empty; give the folder of the run.")
        try:
            _check_sections(config.value)
            configure(config.value, _NUM_PROCESSES.value or 1)
            from ddnp_jax import parallel

            logging.set_verbosity(logging.WARNING)
            logging.get_absl_logger().addFilter(_is_not_of_orbax)
            sys.unraisablehook = _print_unless_of_orbax
            relay = parallel.initialize(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        except (ValueError, ImportError) as error:
            raise SystemExit(f"error: {error}") from error
        try:
            parallel.check_devices()
            print(job(config.value, _WORKDIR.value))
        except Exception as error:
            _end(error, relay)

    with _interruptible():
        app.run(main, flags_parser=_parse)


def _end(error: Exception, relay: "Relay | None") -> NoReturn:
    """Ends a run immediately after an error: orbax's threads would keep logging, and other processes would wait."""
    from ddnp_jax import ending

    # Some functions raise JAX's RuntimeErrors as ValueErrors; their messages always begin with a code.
    is_of_jax = isinstance(error, RuntimeError | ValueError) and re.match("[A-Z_]+: ", str(error))
    if is_of_jax and relay is not None and relay.is_broken():
        ending.leave_to_resume(f"another process of the run ended ({_first_line(error)})")
    ending.leave(1, _sentence_of(error) or "".join(traceback.format_exception(error)).rstrip())


def _sentence_of(error: Exception) -> str | None:
    """The message for an error that needs no traceback; None for other errors."""
    if of_system := re.search(r"\[os_error_code='(\d+)'\]", str(error)):  # from orbax, which adds a long message
        code = int(of_system[1])
        error = OSError(code, os.strerror(code))
    match error:
        case OSError():
            return f"error: {_of_system(error)}"
        case ValueError() | ImportError() | FloatingPointError():
            return f"error: {error}"
    return None


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, which reports errors as `run` does: one sentence and exit code 1."""

    def __init__(self, **options: Any) -> None:
        """Takes the arguments of `argparse.ArgumentParser`."""
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits."""
        raise SystemExit(f"error: {message}")


def _is_not_of_orbax(record: LogRecord) -> bool:
    """Whether a log record is not from orbax, which logs long messages for errors that it also raises."""
    return "orbax" not in Path(record.pathname).parts


def _print_unless_of_orbax(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hides the errors of orbax's other pending writes after one write has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Exits with a message if Ctrl-C is pressed before the run handles it, or a second time."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command resumes what was saved.", file=sys.stderr, flush=True)
        os._exit(_INTERRUPTED)  # threads of JAX and orbax may be waiting, for example for other processes


def _of_system(error: OSError) -> str:
    """The message of an OSError: complete if this library raised it, otherwise with a remark about the saved files."""
    return str(error) if error.errno is None else f"{error}; files that were saved before are unchanged."


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
