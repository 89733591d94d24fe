"""`uni-instruct quickstart`: run the other commands in turn, and print each as a user would type it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import rich_click as click

from uni_instruct.cli import cli
from uni_instruct.system.ports import free_address
from uni_instruct.system.processes import die_with_parent


@click.command()
@click.option("--out", default="runs/quickstart", type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--no-serve", is_flag=True, help="Stop before serving.")
@click.option("--port", default=3000, type=click.IntRange(1, 65535), help="Port of the HTTP service and the web demo.")
def quickstart(out: Path, no_serve: bool, port: int) -> None:
    """Train a generator of handwritten digits, export it, score it against its teacher, and serve it.

    It needs no download: the digits come with scikit-learn. It takes minutes on two CPU cores. If it is interrupted, run the
    same command again to continue.

    Example: uni-instruct quickstart --out runs/quickstart
    """
    if not no_serve:
        free_address("127.0.0.1", port)  # report a used port now, not after minutes of training
    generator = out / "generator"
    _train("digits-jeffreys", "--out", out)
    for arguments in (
        ["export", generator, "--to", "onnx"],
        ["generate", generator, "--seeds", "0-99", "--out", out / "images.npz", "--grid", out / "grid.png"],
        ["evaluate", generator, "--reference", "digits", "--teacher", out / "teacher"],
    ):
        _run(*arguments)
    if not no_serve:
        _run("serve", generator, "--port", port)


def _train(*arguments: object) -> None:
    """Run `train` in a separate process, because it may start further processes with its own command-line arguments."""
    words = _shown("train", *arguments)
    # A separate process group, so that Ctrl-C reaches the training only once, through `terminate` below.
    command, parent = [sys.executable, "-m", "uni_instruct", *words], os.getpid()
    process = subprocess.Popen(command, process_group=0, preexec_fn=die_with_parent(parent))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # the training saves its state before it ends
        process.wait()
        raise
    if code:
        sys.exit(code)  # the training has printed the error


def _run(*arguments: object) -> None:
    words = _shown(*arguments)
    # In this process, so that torch is imported only once. Errors are raised to the `main` that runs the quickstart.
    cli.main(words, prog_name="uni-instruct", standalone_mode=False)


def _shown(*arguments: object) -> list[str]:
    words = [str(argument) for argument in arguments]
    click.secho(f"\n$ uni-instruct {shlex.join(words)}", bold=True)
    return words
