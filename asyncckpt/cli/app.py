"""The typer application: arguments and help of every verb; what they do stands in a module of each verb's name.

Those modules are imported when their verb runs, so that ``--help`` and the light verbs start at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asyncckpt.cli.exits import exit_on_error

__all__ = ["app"]

_EXIT_CODES = "Exit codes: 0 ok, 1 error, 2 usage, 3 corrupt, 4 nothing committed."

app = typer.Typer(
    help="Look at and check asyncckpt checkpoints.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Root = Annotated[str, typer.Argument(metavar="ROOT", help="Directory of the checkpoints.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from asyncckpt import __version__

        typer.echo(f"asyncckpt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command(epilog=_EXIT_CODES)
def ls(root: Root, as_json: AsJson = False) -> None:
    """List the steps of ROOT, newest first, damaged ones too."""
    from asyncckpt.cli.ls import run

    with exit_on_error(as_json=as_json):
        code = run(root, as_json=as_json)
    raise typer.Exit(code)


@app.command(epilog=_EXIT_CODES)
def show(
    root: Root,
    step: Annotated[str, typer.Option(metavar="N|latest", help="Which step, by number, tag or 'latest'.")] = "latest",
    only: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only tensors whose path matches, such as 'model/*'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show one step of ROOT: what its header says, and its tensors."""
    from asyncckpt.cli.show import run

    with exit_on_error(as_json=as_json):
        code = run(root, step, only or [], as_json=as_json)
    raise typer.Exit(code)


@app.command(epilog=_EXIT_CODES)
def verify(
    root: Root,
    step: Annotated[str, typer.Option(metavar="N|latest", help="Which step, by number, tag or 'latest'.")] = "latest",
    every: Annotated[bool, typer.Option("--all", help="Every step.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Files read at once.", show_default="CPUs, up to 8")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every array too.")] = False,
    sample: Annotated[
        str, typer.Option(metavar="PERCENT", help="Read only files drawn at random, such as '5%' of the bytes.")
    ] = "100%",
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Read every file of a step of ROOT and compare it with the digests taken when it was written."""
    from asyncckpt.cli.verify import VerifySettings, parse_sample, run

    with exit_on_error(as_json=as_json):
        settings = VerifySettings(threads=threads, deep=deep, sample=parse_sample(sample), seed=seed)
        code = run(root, None if every else step, settings, as_json=as_json)
    raise typer.Exit(code)


@app.command(
    name="run",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Exit code: that of COMMAND; 128 + n when signal n ended it; 126 or 127 when it cannot be run.",
)
def run_command(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="What to run, best after '--'.", show_default=False)
    ],
    grace: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="How long to wait for writers once COMMAND is gone.")
    ] = 30.0,
) -> None:
    """Run COMMAND and leave only when its checkpoint writers have: the process 1 of a container.

    Passes signals on, reaps what is left behind, and gives writers time to commit when COMMAND has crashed.
    """
    from asyncckpt.cli.run import run

    raise typer.Exit(run(command, grace))


@app.command(epilog=_EXIT_CODES)
def demo(
    config: Annotated[str, typer.Option(help="Model size: tiny, mini, small or 124M.")] = "small",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60,
    save_every: Annotated[int, typer.Option(min=1, help="Steps from save to save.")] = 6,
    folder: Annotated[
        Path | None, typer.Option(help="Keep the runs in this new directory.", show_default="a temporary one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a GPT-2, kill it in the middle of a save, resume it, compare it bit for bit (about a minute)."""
    from asyncckpt.cli.demo import DemoSettings, run

    settings = DemoSettings(config=config, steps=steps, save_every=save_every)
    with exit_on_error(as_json=as_json):
        code = run(settings, folder, as_json=as_json)
    raise typer.Exit(code)
