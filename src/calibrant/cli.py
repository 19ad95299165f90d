"""The command line: every command is one call of `calibrant.workflow`, imported when it runs."""

from __future__ import annotations

import errno
import json
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from calibrant.errors import CalibrantError
from calibrant.progress import Progress, bars
from calibrant.settings import DATA, FAMILIES, MODELS, OBJECTIVES, QUICK, STRUCTURES, Request, Settings

if TYPE_CHECKING:
    from calibrant.workflow.running import Outcome

_DEFAULT = Settings()


class _Commands(TyperGroup):
    """Commands whose users' mistakes end in one line on standard error and exit code 2, Ctrl-C in one and 130."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = shlex.join(["calibrant", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo(str(error) or "interrupted", err=True)
            raise typer.Exit(130) from error
        except CalibrantError as error:
            raise _refusal(str(error)) from error
        except MemoryError as error:
            raise _refusal("out of memory: take a smaller --batch-size, fewer --draws or less --held-out") from error
        except OSError as error:
            raise _refusal(_disk(error)) from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, by name: torch is not imported here
                raise
            raise _refusal("the device is out of memory: take a smaller --batch-size") from error


def _refusal(message: str) -> typer.Exit:
    typer.echo(f"calibrant: {' '.join(message.split())}", err=True)
    return typer.Exit(2)


def _disk(error: OSError) -> str:
    if error.errno == errno.EPIPE:  # the reader of a pipe went away, which is no mistake; typer knows what to do
        raise error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {error.filename or 'the run'}: free some, or choose another --out"
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Deep generative models whose amortized uncertainty is checked against the exact posterior.",
)


def main() -> None:
    """The console script `calibrant`."""
    app(prog_name="calibrant")


# -- options -----------------------------------------------------------------------------------------------------------


def _option(*names: str, text: str, setting: str = "", shown: str = "", **more: Any) -> Any:
    """An option whose help names the setting's default, and the one of a quick run; it is None unless it is given."""
    default = shown or str(getattr(_DEFAULT, setting)) if setting else shown
    quick = f"; quick: {QUICK[setting]}" if setting in QUICK else ""
    return typer.Option(*names, help=f"{text} ({default}{quick})" if default else text, show_default=False, **more)


def _flag(name: str, text: str) -> Any:
    return typer.Option(name, help=text)


_Models = Annotated[
    list[str] | None,
    typer.Argument(help=f"Names that `calibrant list models` shows, or FILE.py:Class ({' '.join(MODELS)})."),
]
_Model = Annotated[str, typer.Argument(help="A name that `calibrant list models` shows, or FILE.py:Class.")]
_Kind = Annotated[str | None, typer.Argument(help="models, likelihoods or data (all three).", metavar="KIND")]
_HEADINGS = {
    "models": "Models (or FILE.py:Class)",
    "likelihoods": "Likelihoods (of the models that take one: --set likelihood=NAME)",
    "data": "Data (or FILE.npz, FILE.npy, FILE.py:function)",
}
_Run = Annotated[Path, typer.Argument(help="The run folder.")]
_Data = Annotated[
    str | None,
    _option("--data", text="A name that `list data` shows, FILE.npz, FILE.npy or FILE.py:function", shown=DATA),
]
_RunData = Annotated[str | None, _option("--data", text="Other data than the run's, named as for `run`")]
_DataRoot = Annotated[
    str | None, _option("--data-root", text="Folder of the registered sets' files", shown="$CALIBRANT_DATA")
]
_Download = Annotated[bool, _flag("--download", "Fetch a registered set that is not there")]
_Site = Annotated[list[str] | None, _option("--site", text="NAME=KEY: the program's NAME is the data's KEY")]
_Set = Annotated[list[str] | None, _option("--set", text="NAME=VALUE: an argument of the model, JSON or a plain word")]
_Structure = Annotated[
    str | None, _option("--structure", text=f"Of the guide: {', '.join(STRUCTURES)}", setting="structure")
]
_Family = Annotated[
    list[str] | None,
    _option(
        "--family",
        text=f"Of the guide: NAME for all latents, or SITE=NAME for one, repeated; names: {', '.join(FAMILIES)}",
        setting="family",
    ),
]
_Objective = Annotated[
    str | None, _option("--objective", text=f"Of training: {', '.join(OBJECTIVES)}", setting="objective")
]
_Epochs = Annotated[int | None, _option("--epochs", text="Passes over the training data", setting="epochs", min=1)]
_BatchSize = Annotated[int | None, _option("--batch-size", text="Data a step", setting="batch_size", min=1)]
_Lr = Annotated[float | None, _option("--lr", text="First learning rate", setting="lr")]
_Seed = Annotated[int | None, _option("--seed", text="Of everything random", setting="seed", min=0)]
_Device = Annotated[str | None, _option("--device", text="Where to train", setting="device")]
_Draws = Annotated[
    int | None, _option("--draws", text="Draws a datum, and of each reference chain", setting="draws", min=100)
]
_Chains = Annotated[int | None, _option("--chains", text="Reference chains", setting="chains", min=1)]
_Warmup = Annotated[
    int | None, _option("--warmup", text="Adaptation steps of a chain (MCMC alone)", setting="warmup", min=1)
]
_HeldOut = Annotated[
    int | None,
    _option("--held-out", text="Test data that are checked; fewer than 73 never pass", setting="held_out", min=2),
]
_Simulations = Annotated[
    int | None,
    _option("--simulations", text="Data that the model simulates, to calibrate on", setting="simulations", min=100),
]
_Remedies = Annotated[bool, _flag("--remedies", "Try what could mend the guide: it takes a few trainings")]
_Out = Annotated[Path | None, _option("--out", text="The run folder", shown="runs/MODEL-DATA-N")]
_Overwrite = Annotated[bool, _flag("--overwrite", "Replace the run in --out, never a folder of anything else")]
_Resume = Annotated[bool, _flag("--resume", "Go on with the run in --out")]
_Quick = Annotated[bool, _flag("--quick", "A small run, to see that all works")]
_Quiet = Annotated[bool, _flag("--quiet", "No progress")]
_UserModel = Annotated[
    list[str] | None, _option("--model", text="FILE.py:Class, for a run of a model in a file of yours")
]


def _request(given: dict[str, Any]) -> Request:
    """The request that a command's options make."""
    asked = {name: given.get(name) for name in Settings.__dataclass_fields__}
    settings: dict[str, Any] = {n: value for n, value in asked.items() if value is not None and value is not False}
    if "family" in settings:
        settings["family"] = _family(settings["family"])
    if "lr" in settings and not settings["lr"] > 0:
        raise CalibrantError(f"--lr {settings['lr']}: a learning rate is positive")
    return Request(
        models=tuple(given.get("models") or ()),
        data=given.get("data"),
        data_root=given.get("data_root"),
        download=given.get("download", False),
        site=dict(_pair("--site", text) for text in given.get("site") or ()),
        arguments={
            name: _json(value) for name, value in (_pair("--set", text) for text in given.get("arguments") or ())
        },
        settings=settings,
        quick=given.get("quick", False),
        out=given.get("out"),
        overwrite=given.get("overwrite", False),
        resume=given.get("resume", False),
    )


_FORMS = {"--set": "NAME=VALUE", "--site": "NAME=KEY", "--family": "SITE=NAME, or one NAME alone for all latents"}


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise CalibrantError(f"{option} {text}: write {_FORMS[option]}")
    return name, value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _family(given: list[str]) -> str | dict[str, str]:
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    return dict(_pair("--family", text) for text in given)


# -- commands ----------------------------------------------------------------------------------------------------------


def _tell_version(asked: bool) -> None:
    if asked:
        from calibrant._version import __version__

        typer.echo(f"calibrant {__version__}")
        raise typer.Exit


_Version = Annotated[
    bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_tell_version)
]


@app.callback()
def _calibrant(version: _Version = False) -> None:
    """Before any command."""


@app.command()
def run(
    ctx: typer.Context,
    models: _Models = None,
    data: _Data = None,
    data_root: _DataRoot = None,
    download: _Download = False,
    site: _Site = None,
    arguments: _Set = None,
    structure: _Structure = None,
    family: _Family = None,
    objective: _Objective = None,
    epochs: _Epochs = None,
    batch_size: _BatchSize = None,
    lr: _Lr = None,
    seed: _Seed = None,
    device: _Device = None,
    draws: _Draws = None,
    chains: _Chains = None,
    warmup: _Warmup = None,
    held_out: _HeldOut = None,
    simulations: _Simulations = None,
    remedies: _Remedies = False,
    out: _Out = None,
    overwrite: _Overwrite = False,
    resume: _Resume = False,
    quick: _Quick = False,
    quiet: _Quiet = False,
) -> None:
    """Fit models, sample their posteriors, compare them with the exact ones, and write a report."""
    request = _request(locals())
    from calibrant import workflow

    _show(_with_bars(quiet, lambda progress: workflow.run(request, progress, ctx.obj)))


@app.command()
def fit(
    model: _Model,
    data: _Data = None,
    data_root: _DataRoot = None,
    download: _Download = False,
    site: _Site = None,
    arguments: _Set = None,
    structure: _Structure = None,
    family: _Family = None,
    objective: _Objective = None,
    epochs: _Epochs = None,
    batch_size: _BatchSize = None,
    lr: _Lr = None,
    seed: _Seed = None,
    device: _Device = None,
    out: _Out = None,
    overwrite: _Overwrite = False,
    resume: _Resume = False,
    quick: _Quick = False,
    quiet: _Quiet = False,
) -> None:
    """Fit a model and its guide; `check` then judges it."""
    request = _request({**locals(), "models": [model]})
    from calibrant import store, workflow

    outcome = _with_bars(quiet, lambda progress: workflow.fit_run(request, progress))
    trained = store.read_config(outcome.folder)["fit"]
    for note in outcome.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"held-out ELBO {_number(trained['elbo'], trained['elbo_se'])} nats after {trained['epochs']} epochs")
    typer.echo(f"{outcome.folder}: judge it with `calibrant check {shlex.quote(str(outcome.folder))}`")


@app.command()
def check(
    ctx: typer.Context,
    out: _Run,
    models: _UserModel = None,
    data: _RunData = None,
    data_root: _DataRoot = None,
    download: _Download = False,
    site: _Site = None,
    seed: _Seed = None,
    draws: _Draws = None,
    chains: _Chains = None,
    warmup: _Warmup = None,
    held_out: _HeldOut = None,
    simulations: _Simulations = None,
    remedies: _Remedies = False,
    quick: _Quick = False,
    quiet: _Quiet = False,
) -> None:
    """Can the uncertainty of a trained run's guide be believed? Verdicts, and a report."""
    request = _request(locals())
    from calibrant import workflow

    _show(_with_bars(quiet, lambda progress: workflow.check_run(request, progress, ctx.obj)))


@app.command()
def report(ctx: typer.Context, out: _Run, models: _UserModel = None, quiet: _Quiet = False) -> None:
    """Write the report of a run anew, from the results that it holds."""
    request = _request(locals())
    from calibrant import workflow

    _show(_with_bars(quiet, lambda progress: workflow.report_run(request, progress, ctx.obj)))


@app.command("list")
def list_(kind: _Kind = None, data_root: _DataRoot = None) -> None:
    """The models, likelihoods and data sets that are known by name."""
    from calibrant import data, models

    lines = {
        "models": {name: models.card(name).equations for name in models.list_models()},
        "likelihoods": {e.name: f"{e.equations} [{e.density_of}]" for e in models.list_likelihoods()},
        "data": {entry.name: f"{entry.description} [{entry.state(data_root)}]" for entry in data.list_data()},
    }
    if kind not in (None, *lines):
        raise CalibrantError(f"there is no list of {kind}: write {', '.join(lines)}, or nothing for all")
    shown = lines if kind is None else {kind: lines[kind]}
    width = max(len(name) for entries in shown.values() for name in entries) + 2
    for heading, entries in shown.items():
        typer.echo(_HEADINGS[heading])
        for name, text in entries.items():
            typer.echo(f"  {name:<{width}}{text}")


# -- what is shown -----------------------------------------------------------------------------------------------------


def _with_bars(quiet: bool, call: Callable[[Progress], Outcome]) -> Outcome:
    with bars(quiet) as progress:
        return call(progress)


def _number(value: float | None, error: float | None = None, digits: int = 2) -> str:
    """A number with its standard error; a dash where it is not known."""
    if value is None or value != value:
        return "–"
    known = error is not None and error == error
    return f"{value:.{digits}f} ± {error:.{digits}f}" if known else f"{value:.{digits}f}"


def _show(outcome: Outcome) -> None:
    """The summary: a table of numbers, the conclusions with what they rest on, the notes, where the report lies."""
    from rich.console import Console
    from rich.table import Table

    from calibrant.workflow.summary import summarise

    summaries = [summarise(result) for result in outcome.results]
    table = Table(caption="nats per datum; the gap is log evidence − ELBO, both of the checked data")
    for heading in ("model", "ELBO (validation)", "log evidence (checked)", "gap (checked)"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in summaries:
        table.add_row(
            row.name, _number(row.elbo, row.elbo_se), _number(row.evidence), _number(row.gap, row.gap_se, digits=3)
        )
    Console(file=sys.stdout, highlight=False).print(table)
    for row in summaries:
        typer.echo(f"{row.name}: {row.conclusion}")
        for detail in row.details:
            typer.echo(f"  {detail}")
    for note in dict.fromkeys(outcome.notes):
        typer.echo(f"note: {note}")
    typer.echo(f"report: {outcome.report}")
