"""The command line: every command is one call of `calibrant.workflow`, which is imported when the command runs."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from calibrant.columns import wrapped
from calibrant.completion import COMPLETIONS, LISTS
from calibrant.errors import CalibrantError
from calibrant.interrupts import exit_code, sigterm_interrupts
from calibrant.printing import interruption, number, show, show_names, show_speeds
from calibrant.processes import import_ahead
from calibrant.progress import Progress, bars
from calibrant.settings import MODELS, QUICK, Effort, Request, Settings, announced

_DEFAULT = Settings()
Found = TypeVar("Found")
Command: TypeAlias = Callable[[typer.Context, Request, bool], None]


class _Commands(TyperGroup):
    """Commands that report a mistake of the user in one line with exit code 2, Ctrl-C and SIGTERM in one line with 130
    and 143."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = shlex.join(["calibrant", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with sigterm_interrupts():
            try:
                with warnings.catch_warnings():
                    warnings.showwarning = _show_warning
                    return self._told(ctx)
            except KeyboardInterrupt as error:
                typer.echo(interruption(str(error) or "interrupted"), err=True)
                raise typer.Exit(exit_code()) from error

    def _told(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CalibrantError as error:
            raise _refusal(str(error)) from error
        except MemoryError as error:
            raise _refusal(_MEMORY) from error
        except OSError as error:
            raise _refusal(_disk(error)) from error
        except RuntimeError as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: torch is not imported here
                raise _refusal("the device is out of memory: use a smaller --batch-size") from error
            if "can't allocate memory" not in str(error):
                raise
            raise _refusal(_MEMORY) from error
        except SystemExit as error:  # a command ends with an exception of typer's
            raise _refusal(
                f"code of yours calls sys.exit({error.code or ''}): let it return, or raise an error that says what is "
                "wrong"
            ) from error


_MEMORY = "out of memory: use a smaller --batch-size, fewer --draws or smaller --held-out"


def _refusal(message: str) -> typer.Exit:
    typer.echo(f"calibrant: {' '.join(message.split())}", err=True)
    return typer.Exit(2)


def _disk(error: OSError) -> str:
    if error.errno == errno.EPIPE:  # the reader of a pipe has closed it, which is no mistake; typer handles it
        raise error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {error.filename or 'the run'}: free some space, or choose another --out"
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Deep generative models whose amortized uncertainty is checked against the exact posterior.",
)


def main() -> None:
    """The console script `calibrant`."""
    app(prog_name="calibrant")


# -- options -----------------------------------------------------------------------------------------------------------
#
# Options are generated from the fields of `Settings` and `Request`. Arguments, and options that a command describes
# differently, are written by hand.

_Models = Annotated[
    list[str] | None,
    typer.Argument(
        help="Names that `calibrant list models` shows, or FILE.py:Class; MODEL+STRUCTURE adds a guide for the "
        f"model of an earlier name ({' '.join(MODELS)}).",
        autocompletion=COMPLETIONS["models"],
    ),
]
_Model = Annotated[
    str,
    typer.Argument(
        help="A name that `calibrant list models` shows, or FILE.py:Class.", autocompletion=COMPLETIONS["models"]
    ),
]
_Kind = Annotated[
    str | None, typer.Argument(help=f"{', '.join(LISTS)} (all).", metavar="KIND", autocompletion=COMPLETIONS["kind"])
]
_HEADINGS = {
    "models": "Models (or FILE.py:Class)",
    "presets": "Presets of models (--set preset=NAME)",
    "likelihoods": "Likelihoods (of the models that take one: --set likelihood=NAME)",
    "methods": "Methods that learn representations with uncertainties (representations.train_representation)",
    "data": "Data (or FILE.npz, FILE.npy, FILE.csv, FOLDER/ of photographs by class, FILE.py:function)",
}
_Run = Annotated[Path, typer.Argument(help="The run folder.")]
_Measured = Annotated[
    str | None,
    typer.Argument(
        help="A run folder, a name that `calibrant list models` shows, MODEL+STRUCTURE, or FILE.py:Class; without one, "
        "an EA-VAE with Laplace latents is measured.",
        metavar="RUN | MODEL",
        autocompletion=COMPLETIONS["models"],
    ),
]
_Json = Annotated[Path | None, typer.Option("--json", help="File to write the table to, as JSON")]
_RunData = Annotated[
    str | None,
    typer.Option(
        "--data", help="Data to check in place of the run's, named as for `run`", autocompletion=COMPLETIONS["data"]
    ),
]
_UserModel = Annotated[
    list[str] | None, typer.Option("--model", help="FILE.py:Class, if the run's model is in a file of yours")
]
_DataRoot = Annotated[
    str | None, typer.Option("--data-root", help="Folder with the files of the registered data sets ($CALIBRANT_DATA)")
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress")]


def _about(name: str) -> tuple[Any, Mapping[str, Any]]:
    """Type and description of a field; if `Settings` only changes its default, the description is in `Effort`."""
    owners = [kind for kind in (Settings, Effort, Request) if name in kind.__dataclass_fields__]
    described = next(kind.__dataclass_fields__[name].metadata for kind in owners[::-1])
    return get_type_hints(owners[0])[name], described


def _option(name: str) -> Parameter:
    """An option whose help names the default and the value of a quick run; it is None unless the user gives it."""
    kind, about = _about(name)
    default = about.get("shown", getattr(_DEFAULT, name, None))
    quick = f"; quick: {QUICK[name]}" if name in QUICK else ""
    text = about["help"][:1].upper() + about["help"][1:]
    flag = about.get("flag", f"--{name.replace('_', '-')}")
    if kind is bool:
        return _parameter(name, Annotated[bool, typer.Option(flag, help=text)], False)
    shown = f"{text} ({default}{quick})" if default is not None else text
    completed = COMPLETIONS.get(name)
    found = typer.Option(flag, help=shown, show_default=False, min=about.get("minimum"), autocompletion=completed)
    kinds = get_args(kind) or (kind,)
    is_repeated = get_origin(kind) is dict or any(get_origin(one) is dict for one in kinds)
    taken: Any = list[str] if is_repeated else kinds[0]
    return _parameter(name, Annotated[taken | None, found], None)


def _parameter(name: str, annotation: Any, default: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _fields(asked: str) -> list[str]:
    """The fields of a group, or the one field with this name."""
    known = {**Settings.__dataclass_fields__, **Request.__dataclass_fields__}
    return [name for name in known if _about(name)[1]["group"] == asked] or [asked]


def _takes(*options: str, **by_hand: Any) -> Callable[[Command], Callable[..., None]]:
    """Decorator that gives a function of (context, request, quiet) the command line options of groups and fields.

    Args:
        options: groups of fields of `Settings` and `Request`, or names of fields.
        by_hand: field → parameter, for the fields that this command describes differently.
    """

    def make(command: Command) -> Callable[..., None]:
        def call(ctx: typer.Context, quiet: bool, **given: Any) -> None:
            command(ctx, _request(given), quiet)

        made = [_option(name) for asked in options for name in _fields(asked) if name not in by_hand]
        own = [_parameter(name, kind, *([] if kind in (_Model, _Run) else [None])) for name, kind in by_hand.items()]
        first, last = _parameter("ctx", typer.Context), _parameter("quiet", _Quiet, False)
        parameters = [first, *own, *made, last]
        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in parameters}
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        return call

    return make


def _request(given: dict[str, Any]) -> Request:
    """The request that a command's options describe."""
    told = {name: value for name, value in given.items() if value is not None and value is not False}
    if "family" in told:
        told["family"] = _family(told["family"])
    if "encoder" in told:
        told["encoder"] = _encoder(told["encoder"])
    if "lr" in told and not told["lr"] > 0:
        raise CalibrantError(f"--lr {told['lr']}: the learning rate must be positive")
    if "memory" in told and not told["memory"] > 0:
        raise CalibrantError(f"--memory {told['memory']}: give the GiB that one run may take, a positive number")
    named = [told.pop("model")] if "model" in told else []
    told["models"] = (*named, *told.get("models", ()))
    if "site" in told:
        told["site"] = dict(_pair("--site", text) for text in told["site"])
    for name, flag in (("arguments", "--set"), ("data_options", "--data-option")):
        if name in told:
            told[name] = _values(flag, told[name])
    settings = {name: told.pop(name) for name in Settings.__dataclass_fields__ if name in told}
    return Request(**told, settings=settings)


_FORMS = {
    "--set": "NAME=VALUE",
    "--data-option": "NAME=VALUE",
    "--site": "NAME=KEY",
    "--family": "SITE=NAME, or one NAME alone for all latents",
    "--encoder": 'INPUT=NAME for each input, or one NAME or {"name": NAME, OPTION: VALUE} alone',
}


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise CalibrantError(f"{option} {text}: write {_FORMS[option]}")
    return name, value


def _values(option: str, given: list[str]) -> dict[str, Any]:
    """Name → value, of a repeated option NAME=VALUE."""
    return {name: _json(option, value) for name, value in (_pair(option, text) for text in given)}


def _json(option: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        if text[:1] in "{[":
            raise CalibrantError(
                f"{option}: {text} is no valid JSON ({error}); strings stand in double quotes"
            ) from error
        return text


def _family(given: list[str]) -> str | dict[str, str]:
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    return dict(_pair("--family", text) for text in given)


def _encoder(given: list[str]) -> Any:
    if len(given) == 1 and (given[0][:1] == "{" or "=" not in given[0]):
        return _json("--encoder", given[0])
    return _values("--encoder", given)


# -- commands ----------------------------------------------------------------------------------------------------------


def _tell_version(asked: bool) -> None:
    if asked:
        from calibrant._version import __version__

        typer.echo(f"calibrant {__version__}")
        raise typer.Exit


_Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_tell_version)
]


@app.callback()
def _calibrant(version: _Version = False) -> None:
    """Take the options that stand before any command."""


@app.command()
@_takes("data", "model", "training", "check", "folder", models=_Models)
def run(ctx: typer.Context, request: Request, quiet: bool) -> None:
    """Fit models, sample their posteriors, compare them with the exact ones, and write a report."""
    if not quiet:
        typer.echo(wrapped(announced(request), file=sys.stderr), err=True)
    if len(request.models) != 1 and (os.cpu_count() or 1) > 1 and os.environ.get("OMP_NUM_THREADS") != "1":
        import_ahead("calibrant.workflow.running")  # models will run side by side
    show(_with_bars(quiet, lambda workflow, progress: workflow.run(request, progress, ctx.obj)))


@app.command()
@_takes("data", "model", "training", "folder", model=_Model)
def fit(ctx: typer.Context, request: Request, quiet: bool) -> None:
    """Fit a model and its guide; `calibrant check` then checks the guide."""
    outcome = _with_bars(quiet, lambda workflow, progress: workflow.fit_run(request, progress))
    from calibrant import store
    from calibrant.inference.fitting.state import HELD_OUT

    trained = store.read_config(outcome.folder)["fit"]
    for note in outcome.notes:
        typer.echo(f"note: {note}")
    is_elbo = trained.get("is_elbo", True)
    value = f"{number(trained['elbo'], trained['elbo_se'])} nats ({trained['epochs']} epochs)"
    typer.echo(f"{HELD_OUT[is_elbo]} {value}")
    check = f": check it with `calibrant check {shlex.quote(str(outcome.folder))}`" if is_elbo else ""
    typer.echo(f"{outcome.folder}{check}")


@app.command()
@_takes("data", "seed", "check", "quick", out=_Run, models=_UserModel, data=_RunData)
def check(ctx: typer.Context, request: Request, quiet: bool) -> None:
    """Check whether the uncertainty of a trained run's guide can be believed; write verdicts and a report."""
    show(_with_bars(quiet, lambda workflow, progress: workflow.check_run(request, progress, ctx.obj)))


@app.command()
@_takes(out=_Run, models=_UserModel)
def report(ctx: typer.Context, request: Request, quiet: bool) -> None:
    """Write the report of a run again, from its stored results."""
    show(_with_bars(quiet, lambda workflow, progress: workflow.report_run(request, progress, ctx.obj)))


@app.command()
@_takes(
    *("data", "structure", "family", "encoder", "objective", "batch_size", "seed", "device", "quick"),
    *("chains", "warmup", "draws", "arguments"),
    model=_Measured,
    models=_UserModel,
    out=_Json,
)
def bench(ctx: typer.Context, request: Request, quiet: bool) -> None:
    """Measure how fast a model trains, draws and gets a reference posterior on this machine.

    The share of time outside arithmetic is one minus the time of the recorded graph, run alone, over that of a step.
    With --quick, each part is measured for about a second. Nothing is written without --json.
    """
    show_speeds(_with_bars(quiet, lambda workflow, progress: workflow.bench_run(request, progress)))


@app.command("list")
def list_(kind: _Kind = None, data_root: _DataRoot = None) -> None:
    """List the models, presets, likelihoods, methods and data sets that are known by name."""
    with _loaded("representations", not sys.stderr.isatty()) as (representations, _):
        from calibrant import models

    lines = {
        "models": {name: models.card(name).equations for name in models.list_models()},
        "presets": {
            f"{name} preset={preset}": about.about
            for name in models.list_models()
            for preset, about in models.card(name).presets.items()
        },
        "likelihoods": {e.name: f"{e.equations} [{e.density_of}]" for e in models.list_likelihoods()},
        "methods": {name: representations.method_card(name).about for name in representations.methods()},
        "data": _data_lines(data_root),
    }
    if kind not in (None, *lines):
        raise CalibrantError(f"there is no list of {kind}: write {', '.join(lines)}, or nothing for all")
    shown = lines if kind is None else {kind: lines[kind]}
    show_names({_HEADINGS[heading]: entries for heading, entries in shown.items()})


def _data_lines(data_root: str | None) -> dict[str, str]:
    """Data sets, each followed by the human labels of it."""
    from calibrant import data

    lines = {}
    for entry in data.list_data():
        lines[entry.name] = f"{entry.description} [{entry.state(data_root)}]"
        for labels in data.list_human_labels():
            if labels.data == entry.name:
                lines[f"+ {labels.name}"] = f"{labels.description} [{labels.state(data_root)}]"
    return lines


_Paper = Annotated[
    str | None,
    typer.Argument(
        help="Name of a paper; without it, papers and experiments are listed.", autocompletion=COMPLETIONS["paper"]
    ),
]
_Only = Annotated[list[str] | None, typer.Option("--only", help="Name of an experiment, repeated for several (all)")]
_Domain = Annotated[list[str] | None, typer.Option("--domain", help="Domain of a paper, repeated for several (all)")]
_Small = Annotated[bool, typer.Option("--quick", help="Small settings, to see that everything works")]
_Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="Number of seeds of each experiment (on its card)")]
_Device = Annotated[str, typer.Option("--device", help="Device to train on", show_default=True)]
_Folder = Annotated[Path | None, typer.Option("--out", help="Run folder (runs/reproduce-PAPER, with -quick)")]
_Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out; finished cells are kept")]
_Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace the run in --out; with --resume, only cells whose settings, data or code changed"
    ),
]
_Download = Annotated[bool, typer.Option("--download", help="Download registered data sets that are missing")]


@app.command()
def reproduce(
    ctx: typer.Context,
    paper: _Paper = None,
    only: _Only = None,
    domain: _Domain = None,
    quick: _Small = False,
    device: _Device = "cpu",
    seeds: _Seeds = None,
    out: _Folder = None,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    data_root: _DataRoot = None,
    download: _Download = False,
    quiet: _Quiet = False,
) -> None:
    """Run the experiments of a paper, and show its numbers beside ours; without PAPER, list papers and experiments."""
    if paper is None:
        if only or domain or quick or resume or overwrite or out is not None:
            papers = import_module("calibrant.reproductions").list_papers()
            raise CalibrantError(f"name the paper: {', '.join(one.name for one in papers)}")
        with _loaded("reproductions.telling", not sys.stderr.isatty()) as (telling, _):
            pass
        typer.echo(telling.listing(data_root))
        return
    with _loaded("reproductions", quiet) as (reproductions, progress):
        results = reproductions.run(
            paper,
            only=only or (),
            domain=domain or (),
            quick=quick,
            seeds=seeds,
            device=device,
            out=out,
            resume=resume,
            overwrite=overwrite,
            data_root=data_root,
            download=download,
            command=ctx.obj,
            progress=progress,
        )
    from calibrant.reproductions.telling import told

    typer.echo(told(results))
    if results.failed:
        raise typer.Exit(1)


# -- what is shown -----------------------------------------------------------------------------------------------------


@contextmanager
def _loaded(part: str, quiet: bool) -> Iterator[tuple[Any, Progress]]:
    """A part of the package, whose import takes seconds, and a display that says so at once."""
    with bars(quiet) as progress:
        progress("loading PyTorch", 0, 1)
        module = import_module(f"calibrant.{part}")
        progress("loading PyTorch", 1, 1)
        yield module, progress


def _with_bars(quiet: bool, call: Callable[[Any, Progress], Found]) -> Found:
    """What `call(workflow, progress)` returns."""
    with _loaded("workflow", quiet) as (workflow, progress):
        return call(workflow, progress)
