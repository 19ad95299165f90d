"""Item response: how able is each pupil, and how hard and how telling is each question?

Source: Birnbaum's two-parameter logistic model, in Lord & Novick 1968, "Statistical theories of mental test scores".
The answers are drawn from a stated truth: abilities from N(0, 1), difficulties from −1.5 to 1.5. Latent: a pupil's
`ability`, and, shared by all pupils, a question's `difficulty` and `discrimination`. The check tells whether the
guide's ability carries the uncertainty of the questions too: an encoder that knows only their best values is too
sure.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import calibrant as cal


class Model(PyroModule):
    """The probability of a right answer is logistic in ability less difficulty.

    Args:
        questions: number of questions.
    """

    dims = {"difficulty": ["question"], "discrimination": ["question"]}

    def __init__(self, questions: int = 8) -> None:
        super().__init__()
        self.questions = questions

    def forward(self, size: int) -> torch.Tensor:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.5).expand([self.questions]).to_event(1))
        discrimination = pyro.sample("discrimination", dist.LogNormal(0.0, 0.5).expand([self.questions]).to_event(1))
        with pyro.plate("data", size):
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
            logits = discrimination * (ability[:, None] - difficulty)
            return pyro.sample("right", dist.Bernoulli(logits=logits).to_event(1))


def data() -> dict[str, cal.data.Data]:
    """100 pupils; their questions are shared, so that nobody is held out."""
    generator = torch.Generator().manual_seed(0)
    ability = torch.randn(100, generator=generator)
    logits = ability[:, None] - torch.linspace(-1.5, 1.5, 8)
    right = torch.bernoulli(logits.sigmoid(), generator=generator)
    pupils = cal.data.Data({"right": right}, name="a simulated test")
    return {"train": pupils, "validation": pupils, "test": pupils}
