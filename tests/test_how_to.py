"""The pages of docs/how-to, followed literally in a copy of the package: files are saved as they say, their commands
run, and the new part's density is compared with SciPy's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "how-to"

CHECKS = {
    "add-a-model": """
import numpy as np, torch, calibrant as cal
from scipy import stats
model = cal.models.create("random-walk", rate=0.7, noise=0.3)
times = torch.tensor([[0.5, 1.5, 1.75], [1.0, 2.0, 4.0]])
moves, x = torch.randn(2, 3), torch.randn(2, 3)
density = cal.program.log_density(model, {"moves": moves, "x": x}, 2, {"times": times}, observed=["x"])
spans = np.diff(times.numpy(), prepend=0.0)
prior = stats.norm(0, 0.7 * spans**0.5).logpdf(moves).sum(1)
noise = stats.norm(np.cumsum(moves.numpy(), 1), 0.3).logpdf(x).sum(1)
assert np.allclose(density.latent.detach(), prior, atol=1e-4)
assert np.allclose(density.observed.detach(), noise, atol=1e-4)
many = cal.program.sample_prior(model, 20_000, {"times": times[:1].expand(20_000, 3)}, seed=0)["x"].numpy()
covariance = 0.49 * np.minimum.outer(times[0].numpy(), times[0].numpy()) + 0.09 * np.eye(3)
assert np.allclose(np.cov(many.T), covariance, atol=0.05)
""",
    "add-a-likelihood": """
import numpy as np, torch, calibrant as cal
from scipy import stats
likelihood = cal.models.make_likelihood({"name": "laplace", "scale": 0.3})
location, x = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
truth = stats.laplace(loc=location.numpy(), scale=0.3)
assert np.allclose(likelihood(location).log_prob(x).detach(), truth.logpdf(x).sum((1, 2)), atol=1e-4)
assert np.allclose(likelihood.noise_sd(location).item(), stats.laplace(scale=0.3).std(), atol=1e-6)
assert cal.models.make_likelihood({"name": "laplace", "learn": False}).state_dict().keys() == {"log_scale"}
model = cal.models.create("ea-vae", shape=(2, 3), latents=2, likelihood="laplace")
assert cal.program.sample_prior(model, 4, seed=0)["x"].shape == (4, 2, 3)
""",
    "add-a-data-set": """
import numpy as np, calibrant as cal
from sklearn.datasets import load_wine
splits = cal.data.load("wine", seed=3)
raw = load_wine().data
rows = np.concatenate([data.tensors()[0]["x"].numpy() for data in splits.values()])
wanted = (raw - raw.mean(0)) / raw.std(0)
assert np.allclose(rows[np.lexsort(rows.T)], wanted[np.lexsort(wanted.astype(np.float32).T)], atol=1e-5)
assert not np.array_equal(splits["test"].labels(), cal.data.load("wine", seed=4)["test"].labels())
""",
    "add-a-family": """
import numpy as np, pyro, pyro.distributions as dist, torch, calibrant as cal
from scipy import stats
def program(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))
data = {"x": torch.randn(4)}
guide = cal.guides.amortize(program, data, family="gumbel")
run = pyro.poutine.trace(guide).get_trace(data, 4)
run.compute_log_prob()
fn, z = run.nodes["z"]["fn"], run.nodes["z"]["value"].detach()
while not hasattr(fn, "loc"):
    fn = fn.base_dist
truth = stats.gumbel_r(fn.loc.detach().numpy(), fn.scale.detach().numpy())
assert np.allclose(run.nodes["z"]["log_prob"].detach(), truth.logpdf(z.numpy()), atol=1e-4)
""",
    "add-a-method": """
import numpy as np, torch, calibrant as cal
x = torch.randn(200, 2)
data = {"x": x, "y": (x[:, 0] > 0).long()}
trained = cal.representations.train_representation("largest-probability", data, steps=200, lr=0.1, smoothing=0.2)
probabilities = trained.class_probabilities(x)
assert torch.allclose(trained.uncertainty(x), 1 - probabilities.max(1).values)
edge = x[:, 0].abs()
assert np.corrcoef(trained.uncertainty(x), edge)[0, 1] < -0.7
try:
    cal.representations.train_representation("largest-probability", data, smoothing=2.0)
except cal.errors.ProgramError as error:
    assert "smoothing=2.0: give a share" in str(error)
""",
    "add-an-experiment": """
import numpy as np, calibrant as cal
results = cal.reproductions.load_results("runs/reproduce-aevb-quick")
few, many = results.table("latents")
assert (few["row"], many["row"], results.failed) == ("2 latents", "8 latents", [])
gains = [many["seeds"][seed] - few["seeds"][seed] for seed in ("0", "1")]
assert min(gains) > 2
assert np.isclose(many["ours"], np.mean(list(many["seeds"].values())))
assert set(many["steps"].values()) == {60 * 6}
assert "Eight latents in place of two change the ELBO" in results.sentences("latents")[0]
widths = {row["row"]: row for row in results.table("widths")}
(claim,) = results.claims
assert claim["guide"]["answer"] in ("holds", "cannot tell") and claim["exact"]["answer"] == ""
assert np.isclose(claim["guide"]["value"], widths["8 latents"]["ours"] - widths["2 latents"]["ours"])
assert 0 < widths["2 latents"]["ours"] < widths["8 latents"]["ours"] < 1
again = cal.reproductions.run("aevb", quick=True, resume=True, out="runs/reproduce-aevb-quick")
assert again.table("latents") == results.table("latents")
""",
}
LONG = ("add-a-model", "add-a-likelihood", "add-a-family", "add-an-experiment")  # with trainings of the family tests
NAMES = {
    "add-a-model": "random-walk",
    "add-a-likelihood": "laplace",
    "add-a-data-set": "wine",
    "add-a-family": "gumbel",
    "add-a-method": "largest-probability",
    "add-an-experiment": "aevb",
}


def files(page: str) -> dict[str, str]:
    """The files that a page says to save, by path."""
    return dict(re.findall(r"[Ss]ave this as `(src/[^`]+)`:\n\n```python\n(.*?)```", page, re.DOTALL))


def scripts(page: str) -> list[str]:
    """The Python blocks that a page does not say to save."""
    return [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if text not in files(page).values()]


def lines(page: str) -> list[tuple[str, str, str]]:
    """The lines that a page says to save as the first ones of a table: (file, table, lines)."""
    pattern = r"[Ss]ave [^`]*`(src/[^`]+)`, as the first ones? of `(\w+)`[^`]*(?:`[^`\n]+`[^`]*)*:\n\n```text\n(.*?)```"
    return re.findall(pattern, page, re.DOTALL)


def commands(page: str) -> list[str]:
    return [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]


def copy_of_the_package(folder: Path) -> None:
    leave = shutil.ignore_patterns("__pycache__", "golden", "*.pyc")
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", folder)


def follow(page: str, folder: Path) -> None:
    """Save what a page says to save."""
    for path, text in files(page).items():
        assert not (folder / path).exists()
        (folder / path).write_text(text)
    for path, table, text in lines(page):
        whole = (folder / path).read_text()
        head = re.search(rf"^{table}\b.*[({{]\n", whole, re.MULTILINE)
        assert head is not None, table
        (folder / path).write_text(whole[: head.end()] + text + whole[head.end() :])


def run(folder: Path, *words: str) -> str:
    """What a command prints; `python` is the one that runs this test."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    words = (sys.executable, *words[1:]) if words[0] == "python" else words
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_page_is_followed():
    assert {page.stem for page in PAGES.glob("*.md")} == set(CHECKS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.truth) if name in LONG else name for name in CHECKS]
)
def test_a_page_is_followed_literally(name, tmp_path):
    page = (PAGES / f"{name}.md").read_text()
    assert files(page) or lines(page)
    copy_of_the_package(tmp_path)
    follow(page, tmp_path)
    for command in commands(page):
        printed = run(tmp_path, *command.split())
        assert (" passed" in printed) if "pytest" in command else (NAMES[name] in printed), printed
    for script in scripts(page):
        run(tmp_path, "python", "-c", script)
    run(tmp_path, "python", "-c", CHECKS[name])
