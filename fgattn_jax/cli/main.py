"""The command `fgattn`: finds the subcommand, imports only that one, turns errors into one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

_COMMANDS = {
    "demo": "denoise a clip twice, dense and with cached slice masks; pictures and a table of figures",
    "generate": "a clip from a prompt with Wan 2.1 or HunyuanVideo, dense or with slice masks",
    "explain": "which implementation would run a call, and why the others would not",
    "mask-stats": "density, kept counts and memory of a saved mask",
    "bench": "measure attention on this machine",
    "tune": "find the fastest config of the Pallas kernel on this GPU",
    "study": "measure on the shipped model how much attention can be skipped, and when",
}

_DESCRIPTION = "Fine-grained sparse attention for JAX: a mask keeps or skips slices of M neighbouring queries x 1 key."

# Modules that only extras install.
_EXTRAS = {
    "matplotlib": "demo",
    "imageio": "train",
    "skvideo": "train",
    "torch": "torch",
    "diffusers": "torch",
    "transformers": "torch",
}

_EXAMPLES = """\
examples:
  fgattn demo                                            pictures and figures into demo_output/
  fgattn generate --model DIR --prompt "A cat surfs." --out cat.mp4
  fgattn explain --queries 32760 --heads 12 --head-dim 128 --density 0.2
  fgattn mask-stats mask.safetensors --plot mask.png
  fgattn COMMAND --help                                  all options of a command, with examples
"""


def _parser(command: str | None) -> argparse.ArgumentParser:
    from fgattn_jax import __version__

    parser = argparse.ArgumentParser(
        prog="fgattn",
        usage="fgattn [-h] [--version] [--traceback] COMMAND ...",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    width = max(map(len, _COMMANDS))
    overview = "\n".join(f"  {name:<{width}}  {text}" for name, text in _COMMANDS.items())
    parser.epilog = f"commands:\n{overview}\n\n{_EXAMPLES}"
    parser.add_argument("--version", action="version", version=f"fgattn_jax {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from, for reports")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", prog="fgattn", help=argparse.SUPPRESS)
    if command is not None:
        _module(command).add_parser(subparsers)
    return parser


def _module(command: str):
    # Only the command that runs is imported: `fgattn --help` needs neither JAX nor a model.
    return importlib.import_module(f"fgattn_jax.cli.{command.replace('-', '_')}")


def _wanted_command(argv: Sequence[str]) -> str | None:
    # `--version` and `--traceback` take no value, so the first word without a dash is the command.
    return next((word for word in argv if not word.startswith("-")), None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `fgattn`.

    Args:
        argv: The words after `fgattn`; `None` takes those of the process.

    Returns:
        Exit status: what the command returned; 0 after the help of `fgattn` alone; 2 for bad input, with one line on
        standard error and no traceback; 130 after an interrupt.

    Raises:
        SystemExit: From argparse, for `--help`, `--version` (status 0) and wrong options (status 2).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    command = _wanted_command(argv)
    if command is not None and command not in _COMMANDS:
        names = ", ".join(f"`{name}`" for name in _COMMANDS)
        print(
            f"fgattn: error: expected a command, one of {names}; got {command!r}. Try `fgattn --help`", file=sys.stderr
        )
        return 2
    args = _parser(command).parse_args(argv)
    if command is None:
        _parser(None).print_help()
        return 0

    from fgattn_jax.errors import UnsupportedError

    try:
        status = _module(command).run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"fgattn {command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None or args.traceback:
            raise
        message = f"this needs {error.name}, which is not installed: pip install 'fgattn-jax[{extra}]'"
    except (ValueError, UnsupportedError, OSError) as error:
        if args.traceback:
            raise
        message = _one_line(error)
    print(f"fgattn {command}: error: {message}", file=sys.stderr)
    return 2
