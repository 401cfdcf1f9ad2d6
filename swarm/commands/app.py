"""The words of the command `swarm`, put together."""

from typing import Annotated

import typer

from swarm import __version__
from swarm.commands import asking, bench, doctor, gateway, planning, seeing, serving
from swarm.errors import BadInput

app = typer.Typer(
    name="swarm",
    help="Run large language models on machines that nobody owns together.\n\n"
    "Each server holds some blocks of one model; your text flows through a chain of them. "
    "Every server on the chain sees the text's hidden states, the first one its tokens, the last "
    "one the answer: ask only swarms you trust.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print(f"swarm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


app.command()(serving.serve)
app.command()(asking.generate)
app.command()(gateway.api)
app.command()(seeing.status)
app.command()(seeing.invite)
app.add_typer(bench.app, name="bench")
doctor.doctor.command()(planning.plan)
app.add_typer(doctor.doctor, name="doctor")

# Typer brings its own copy of click since 0.26: this is UsageError in either.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def called(words: list[str]) -> int:
    """Run the command that the words name; return its exit code. BadInput for a wrong option."""
    try:
        code = app(args=words, prog_name="swarm", standalone_mode=False)
    except _UsageError as error:
        message = getattr(error, "format_message", error.__str__)()
        path = getattr(getattr(error, "ctx", None), "command_path", "swarm")
        raise BadInput(message.rstrip("."), next_step=f"`{path} --help` tells more") from error
    return code if isinstance(code, int) else 0
