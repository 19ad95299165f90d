"""The figures of docs/examples.md: `python -m examples.figures` runs what is not in runs/examples, and draws all."""

import io
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from calibrant import store, workflow
from calibrant.evaluation.results import RunResult
from calibrant.inference.trees import latent_names
from calibrant.settings import Request

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path != Path(__file__))
RUNS, DOCS = Path("runs/examples"), HERE.parent / "docs" / "examples"
COLOURS = 32  # of the PNG


def result_of(name: str) -> RunResult:
    """The run of an example: the one in the folder of runs, else a new one."""
    folder, spec = RUNS / name, f"{HERE / name}.py:Model"
    if not (folder / store.COMPARISON).is_file():
        workflow.run(Request(models=(spec,), data=f"{HERE / name}.py:data", out=folder), print)
    return store.load_result(folder, model=spec)


def draw(result: RunResult) -> Figure:
    """Posterior means (above) and sds (below) of every latent, the guide's against the reference's."""
    assert result.comparison is not None
    assert result.reference is not None
    trees = {"reference": result.reference, "guide": result.amortized}
    sites = latent_names(result.amortized["posterior"].dataset)
    figure = Figure(figsize=(1.9 * max(len(sites), 2) + 0.4, 3.8), layout="constrained")
    for column, site in zip(figure.subplots(2, len(sites), squeeze=False).T, sites, strict=True):
        draws = {who: tree["posterior"][site] for who, tree in trees.items()}
        if "data" in draws["guide"].dims:
            draws = {who: values.sel(data=result.comparison["data"]) for who, values in draws.items()}
        means, sds = (
            {who: getattr(values, statistic)(("chain", "draw")) for who, values in draws.items()}
            for statistic in ("mean", "std")
        )
        against(column[0], means, float(sds["reference"].mean()))
        against(column[1], {who: np.log10(values) for who, values in sds.items()}, 0.2)
        column[0].set_title(site, fontsize=9)
        column[1].set_xlabel("reference", fontsize=8)
    for axes, words in zip(figure.axes[:: len(sites)], ("guide's mean", "guide's log₁₀ sd"), strict=True):
        axes.set_ylabel(words, fontsize=8)
    return figure


def against(axes: Axes, values: dict[str, xr.DataArray], margin: float) -> None:
    """Points, dots where there are many, and the line of agreement, which goes on by a margin."""
    x, y = (values[who].transpose(*values["guide"].dims).values.ravel() for who in ("reference", "guide"))
    few = len(x) < 50
    axes.plot(x, y, "D" if few else ".", ms=4 if few else 2, color="#0072B2", alpha=1.0 if few else 0.4)
    ends = [min(x.min(), y.min()) - margin, max(x.max(), y.max()) + margin]
    axes.plot(ends, ends, color="#222222", lw=0.8, ls="--")
    axes.tick_params(labelsize=7)


def save(figure: Figure, path: Path) -> None:
    """A PNG of few colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    Image.open(buffer).convert("RGB").quantize(COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    np.seterr(all="ignore")
    for name in NAMES:
        with rc_context({"axes.spines.top": False, "axes.spines.right": False}):
            save(draw(result_of(name)), DOCS / f"{name}.png")
        print(name)
