"""The command line. Sub-commands are named as strings and imported when called, so that `--help` stays fast."""

import importlib
import io
import sys
import warnings
from typing import Any

import rich_click as click
from click.exceptions import Exit

from uni_instruct import __version__
from uni_instruct.errors import UniInstructError
from uni_instruct.system.files import as_path_error
from uni_instruct.system.processes import is_nonzero_rank, sleep_while_waiting
from uni_instruct.system.progress import log_to_stderr

# Name -> (import path, summary), in the order in which a new user needs them.
COMMANDS = {
    "quickstart": (
        "uni_instruct.commands.quickstart:quickstart",
        "Train, export, evaluate and serve a generator of digits.",
    ),
    "data": ("uni_instruct.commands.data:data", "Prepare or check a data set."),
    "train": ("uni_instruct.train.commands.train:train", "Train a teacher and distil it into a one-step generator."),
    "lab": (
        "uni_instruct.train.commands.lab:lab",
        "Compare methods, trained from one teacher with the same seeds.",
    ),
    "doctor": (
        "uni_instruct.train.commands.doctor:doctor",
        "Check data, teacher, devices, memory and disk before a long training.",
    ),
    "average": (
        "uni_instruct.train.commands.average:average",
        "Make a bundle from another average of a run's weights, without training again.",
    ),
    "import": (
        "uni_instruct.commands.import_checkpoint:import_checkpoint",
        "Convert another project's checkpoint to a bundle.",
    ),
    "export": (
        "uni_instruct.export.commands.export:export",
        "Compile a generator to an engine proven equal to torch.",
    ),
    "benchmark": (
        "uni_instruct.commands.benchmark:benchmark",
        "Measure every engine of a bundle on this machine, side by side.",
    ),
    "publish": (
        "uni_instruct.export.commands.publish:publish",
        "Make a generator ready to ship: half-size weights, engine, samples, card.",
    ),
    "card": ("uni_instruct.export.commands.card:card", "Rewrite the model card of a published generator, with its scores."),
    "generate": ("uni_instruct.commands.generate:generate", "Make images from seeds."),
    "evaluate": (
        "uni_instruct.commands.evaluate:evaluate",
        "Score a generator or images against a data set.",
    ),
    "compare": ("uni_instruct.commands.compare:compare", "Decide whether one generator scores better than another."),
    "serve": ("uni_instruct.serve.commands.serve:serve", "Serve generators over HTTP, with a web demo under /ui."),
    "loadtest": (
        "uni_instruct.serve.commands.loadtest:loadtest",
        "Send requests to a server at a steady rate, and check every image that it returns.",
    ),
    "package": (
        "uni_instruct.serve.commands.package:package",
        "Pack generators as a Bento, for a container without torch.",
    ),
    "inspect": ("uni_instruct.commands.inspect:inspect", "Show what is in a bundle, a data set or a checkpoint."),
}


class LazyCommand(click.RichCommand):
    """A placeholder for a command in the group's help. The real command is imported when it is called."""

    def __init__(self, name: str, target: str, summary: str):
        super().__init__(name=name, help=summary, short_help=summary)
        self.target = target

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The real command's context, which runs the real command."""
        module, _, attribute = self.target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command.make_context(info_name, args, parent, **extra)


class LazyGroup(click.RichGroup):
    """A group that lists its commands from the table COMMANDS, without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command's placeholder; None for an unknown name."""
        return LazyCommand(cmd_name, *COMMANDS[cmd_name]) if cmd_name in COMMANDS else None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="uni-instruct")
def cli() -> None:
    """One-step image generators: train, export, serve, sample, evaluate.

    Example: uni-instruct quickstart
    """


def main() -> None:
    """Entry point. Prints the project's errors as one line on standard error and exits with their exit code."""
    sleep_while_waiting()
    _print_any_name()
    # Pillow warns about broken metadata of a photograph at each reading, but names its own source file, not the photograph.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    if not is_nonzero_rank():
        log_to_stderr("uni_instruct.engines.trials.trial")
        log_to_stderr("uni_instruct.engines.compiled.cache")
        log_to_stderr("uni_instruct.export.openvino")
    try:
        cli.main(standalone_mode=False)
    except Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()), error.exit_code)
    except UniInstructError as error:
        _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; run the same command again to continue", 130)
    except OSError as error:
        if (refused := as_path_error(error)) is None:
            raise
        _fail(str(refused), refused.exit_code)
    except ModuleNotFoundError as error:
        _fail(f"package '{error.name}' is not installed; pip install 'uni-instruct[all]'", 2)


def _print_any_name() -> None:
    """Escape bytes that are not valid text, such as in file names. Python itself does so on standard error only."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, exit_code: int) -> None:
    if not is_nonzero_rank():
        print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)
