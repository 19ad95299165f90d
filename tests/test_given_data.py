"""Data in the forms that people have: what they become, and refusals whose remedies work."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torchvision import transforms
from torchvision.datasets import MNIST, FakeData, ImageFolder

import calibrant as cal
from calibrant.errors import DataError, ProgramError

N = 24
RNG = np.random.default_rng(0)
FRAME = pd.DataFrame(
    {
        "height": RNG.normal(size=N),
        "dose": RNG.normal(size=N),
        "arm": pd.Categorical(RNG.choice(["placebo", "drug"], N), ["placebo", "drug"]),
        "name": [f"person {i}" for i in range(N)],
        "day": pd.date_range("2026-01-01", periods=N),
    },
    index=[f"p{i}" for i in range(N)],
)
GREYS = RNG.integers(0, 256, (N, 1, 8, 8), np.uint8)


def trial(size, dose):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("height", dist.Normal(z + dose, 1.0))


def vector(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None], torch.ones(2)).to_event(1))


def given(data, key="x"):
    return {**data.tensors()[0], **data.tensors()[1]}[key].numpy()


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observed", "covariates"),
    [
        (FRAME[["height", "dose"]], None),
        (FRAME[["height"]], FRAME[["dose"]]),
        (FRAME["height"], FRAME["dose"]),
        ({"height": FRAME["height"], "dose": FRAME["dose"].tolist()}, None),
        (xr.Dataset.from_dataframe(FRAME[["height", "dose"]]), None),
        (xr.Dataset.from_dataframe(FRAME[["height"]]).rename(index="data"), {"dose": FRAME["dose"]}),
        (FRAME[["height", "dose"]].convert_dtypes(), None),
    ],
)
def test_every_form_of_a_table_gives_the_same_posterior(observed, covariates):
    guide = cal.guides.amortize(trial, observed, covariates=covariates)
    post = cal.inference.posterior(trial, guide, observed, draws=10, covariates=covariates)
    assert post["posterior"]["data"].values.tolist() == FRAME.index.tolist()
    assert np.allclose(post["observed_data"]["height"], FRAME["height"])
    assert np.allclose(post["constant_data"]["dose"], FRAME["dose"])


def test_fit_and_the_reference_take_a_frame():
    model, data = cal.models.create("ppca", shape=(2,), latents=1), {"x": FRAME[["height", "dose"]]}
    guide = cal.guides.amortize(model, data)
    cal.inference.fit(model, guide, data, epochs=1)
    ref = cal.inference.reference(model, data, draws=500)
    assert ref["posterior"]["data"].values.tolist() == FRAME.index.tolist()


def test_names_of_columns_and_dimensions_reach_the_results():
    frame = {"x": FRAME[["height", "dose"]].rename_axis(columns="quantity")}
    array = xr.DataArray(
        FRAME[["height", "dose"]].to_numpy(), [("trial", np.arange(100, 100 + N)), ("quantity", ["height", "dose"])]
    )
    for observed, labels in ((frame, FRAME.index), ({"x": array}, array["trial"].values)):
        guide = cal.guides.amortize(vector, observed)
        post = cal.inference.posterior(vector, guide, observed, draws=5, groups=["posterior_predictive"])
        for group in ("observed_data", "posterior_predictive"):
            assert post[group]["x"].dims[-1] == "quantity"
            assert post[group]["quantity"].values.tolist() == ["height", "dose"]
            assert post[group]["data"].values.tolist() == list(labels)


def test_categories_become_codes_which_are_told():
    data = cal.data.as_data(FRAME[["height", "arm"]])
    assert given(data, "arm").tolist() == FRAME["arm"].cat.codes.tolist()
    assert data.notes == ("'arm' has the codes placebo = 0, drug = 1",)
    assert "placebo = 0" in repr(data)


def test_labels_of_several_levels_are_joined():
    frame = FRAME.set_index(["arm", "name"])[["height"]]
    assert cal.data.as_data(frame).labels()[3] == f"{FRAME['arm'].iloc[3]}, person 3"


MISSING = FRAME.assign(height=FRAME["height"].where(np.arange(N) != 3))
REFUSED = {
    "text": (lambda: FRAME[["name"]], r"'name' holds text .*frame.astype\({'name': 'category'}\)"),
    "dates": (lambda: FRAME[["day"]], r"'day' holds dates .*\(t - t.min\(\)\).dt.days"),
    "missing": (lambda: MISSING[["height"]], r"'height' has missing values, first at 'p3': .*frame.dropna\(\).*notna"),
    "missing in xarray": (lambda: {"x": MISSING["height"].to_xarray()}, r"x has missing values: .*dropna\('index'\)"),
    "a repeated label": (lambda: FRAME[["dose"]].iloc[[1, 1]], "repeats the label 'p1': .*reset_index"),
    "repeated columns": (lambda: FRAME[["dose", "dose"]], "several columns 'dose'"),
    "numbers as names": (lambda: pd.DataFrame(np.zeros((3, 2))), "a column 0: names are strings.*{'SITE': frame}"),
    "a category in a vector": (lambda: {"x": FRAME[["dose", "arm"]]}, "x mixes numbers and categories"),
    "no name": (lambda: pd.Series([1.0, 2.0]), "the Series has no name: give a dict"),
    "another order": (
        lambda: {"x": FRAME["dose"], "y": FRAME["height"].iloc[::-1]}, r"other labels .* y = y.loc\[x.index\]",
    ),
    "no common dimension": (
        lambda: xr.Dataset({"x": ("a", [1.0]), "y": ("b", [1.0])}), "no dimension in common.*rename.*drop_vars",
    ),
    "a dimension of results": (
        lambda: {"x": xr.DataArray(np.zeros((3, 2)), dims=("trial", "draw"))}, "a dimension 'draw'.*rename",
    ),
    "a ragged list": (lambda: {"x": [[1.0], [1.0, 2.0]]}, "a list whose rows differ"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_tables_are_refused_with_the_remedy(name):
    make, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        cal.data.as_data(make())


def test_the_remedies_of_tables_work():
    assert cal.data.as_data(FRAME.astype({"name": "category"})[["name"]]).notes
    days = (FRAME["day"] - FRAME["day"].min()).dt.days
    assert given(cal.data.as_data(days), "day").tolist() == list(range(N))
    assert len(cal.data.as_data(MISSING[["height"]].dropna())) == N - 1
    values = MISSING["height"]
    masked = cal.data.as_data({"height": values.fillna(0.0)}, {"mask": values.notna()})
    assert given(masked, "mask").sum() == N - 1
    assert len(cal.data.as_data({"x": values.to_xarray().dropna("index")})) == N - 1
    x, y = FRAME["dose"], FRAME["height"].iloc[::-1]
    assert np.allclose(given(cal.data.as_data({"x": x, "y": y.loc[x.index]}), "y"), FRAME["height"])


# -- Datasets of torch -------------------------------------------------------------------------------------------------


class Pairs(Dataset):
    def __init__(self, transform=lambda image: image):
        self.transform = transform

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.transform(Image.fromarray(GREYS[index, 0])), index % 3


@pytest.mark.parametrize(
    "dataset",
    [
        Pairs(),
        Pairs(transforms.ToTensor()),
        TensorDataset(torch.from_numpy(GREYS), torch.arange(N) % 3),
        ConcatDataset([Pairs(), Pairs()]),
        DataLoader(Pairs(), batch_size=5, shuffle=True),
    ],
    ids=["images of pillow", "tensors", "TensorDataset", "ConcatDataset", "DataLoader"],
)
def test_pairs_are_images_with_labels_that_a_program_may_ignore(dataset):
    data = cal.data.as_data(dataset)
    assert data.observed_names == ("x", "y")
    assert torch.allclose(data.batch(range(N))[0]["x"], torch.from_numpy(GREYS) / 255)
    assert data.batch(range(4))[0]["y"].tolist() == [0, 1, 2, 0]
    guide = cal.guides.amortize(cal.models.create("vae", shape=(1, 8, 8), latents=2), dataset)
    assert list(guide.spec["inputs"]) == ["x"]


def test_a_model_with_a_latent_of_the_name_of_the_labels_does_not_get_them():
    guide = cal.guides.amortize(cal.models.create("gsm", shape=(1, 8, 8), latents=2), Pairs())
    assert list(guide.spec["inputs"]) == ["x"]


def test_a_part_of_a_set_keeps_its_places_as_labels():
    part, _ = random_split(Pairs(), [6, N - 6], torch.Generator().manual_seed(0))
    assert cal.data.as_data(part).labels().tolist() == list(part.indices)
    part = torch.utils.data.Subset(part, [3, 1])
    assert cal.data.as_data(part).labels().tolist() == [part.dataset.indices[3], part.dataset.indices[1]]
    loader = DataLoader(Pairs(), sampler=SubsetRandomSampler([7, 2]))
    assert cal.data.as_data(loader).labels().tolist() == [2, 7]


def test_names_of_the_parts():
    data = cal.data.as_data(TensorDataset(torch.zeros(3, 2), torch.zeros(3), torch.ones(3)), names=["counts", "dose"])
    assert data.observed_names == ("counts", "dose")
    with pytest.raises(
        DataError, match=r"3 parts: name them, calibrant.data.as_data\(dataset, names=\['a', 'b', 'c'\]"
    ):
        cal.data.as_data(TensorDataset(torch.zeros(3, 2), torch.zeros(3), torch.ones(3)))


def test_loaders_that_change_the_data_are_refused():
    with pytest.raises(DataError, match=r"by a WeightedRandomSampler: give its data set, loader.dataset"):
        cal.data.as_data(DataLoader(Pairs(), sampler=WeightedRandomSampler([1.0] * N, N)))
    with pytest.raises(DataError, match="has a collate_fn"):
        cal.data.as_data(DataLoader(Pairs(), collate_fn=list))


def test_random_images_are_refused_where_data_have_to_be_fixed():
    model = cal.models.create("ppca", shape=(1, 8, 8), latents=2)
    random = Pairs(transforms.Compose([transforms.RandomCrop(8, 3), transforms.ToTensor()]))
    cal.guides.amortize(model, random)
    with pytest.raises(DataError, match="'x' changes when an item of the Dataset is read again"):
        cal.inference.reference(model, random)


def test_folders_and_sets_of_torchvision(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(RNG.integers(0, 256, (10, 10, 3), np.uint8)).save(tmp_path / name / "1.png")
    folder = cal.data.as_data(ImageFolder(tmp_path))
    assert folder.batch([0, 1])[0]["x"].shape == (2, 3, 10, 10)
    fake = cal.data.as_data(FakeData(4, (3, 8, 9), transform=transforms.ToTensor()))
    assert fake.batch([0])[0]["x"].shape == (1, 3, 8, 9)


@pytest.mark.parametrize("transform", [None, transforms.ToTensor(), transforms.Normalize(0.1, 0.3)])
def test_mnist_is_read_at_once_where_its_items_are_the_stored_images(transform):
    root = cal.data.data_root()
    if not (root / "MNIST/raw").is_dir():
        pytest.skip("no MNIST")
    steps = (
        transforms.Compose([transforms.ToTensor(), transform]) if isinstance(transform, torch.nn.Module) else transform
    )
    found = cal.data.as_data(MNIST(root, train=False, transform=steps))
    assert found.is_stored == (steps is transform)
    image = transforms.ToTensor()(MNIST(root, train=False)[7][0])
    assert torch.allclose(found.batch([7])[0]["x"][0], image if found.is_stored else transform(image))


# -- grey values -------------------------------------------------------------------------------------------------------


def test_8_bit_images_are_scaled_and_it_is_told():
    data = cal.data.as_data({"x": GREYS})
    assert np.allclose(given(data), GREYS / 255)
    (note,) = data.notes
    assert "k are read as k/255, from 0 to 1" in note
    assert note in repr(data)
    assert given(cal.data.as_data({"x": GREYS}, values="stored")).max() > 1
    assert given(cal.data.as_data({"x": GREYS.reshape(N, 64)})).max() > 1, "vectors of integers may be counts"
    assert set(np.unique(given(cal.data.as_data({"x": GREYS.reshape(N, 64)}, values="thresholded")))) == {0.0, 1.0}


@pytest.mark.parametrize("values", ["dequantised", "binarised"])
@pytest.mark.parametrize("source", [{"x": GREYS}, Pairs()], ids=["arrays", "items"])
def test_noise_of_grey_values_depends_on_seed_and_image_alone(values, source):
    first = cal.data.as_data(source, values=values, seed=1)
    assert torch.equal(first.batch([3, 5])[0]["x"][1], first[5:].batch([0])[0]["x"][0])
    other = cal.data.as_data(source, values=values, seed=2)
    assert not torch.equal(first.batch([3])[0]["x"], other.batch([3])[0]["x"])
    assert first.fingerprint() != other.fingerprint()


def test_grey_values_under_a_bernoulli_are_refused_with_a_remedy_that_works():
    model = cal.models.create("vae", shape=(1, 8, 8), latents=2, likelihood="bernoulli")
    with pytest.raises(DataError, match=r"BernoulliEntries.*x > 0.5, or values='binarised' for images"):
        cal.guides.amortize(model, {"x": GREYS})
    cal.guides.amortize(model, {"x": cal.data.as_data({"x": GREYS}).tensors()[0]["x"] > 0.5})
    cal.guides.amortize(model, cal.data.as_data({"x": GREYS}, values="binarised"))


def test_channels_last_and_other_shapes_are_refused_with_the_remedy():
    model = cal.models.create("vae", shape=(3, 8, 9), latents=2)
    x = RNG.integers(0, 256, (N, 8, 9, 3), np.uint8)
    with pytest.raises(DataError, match=r"its channels are last, so give torch.as_tensor\(x\).permute\(0, 3, 1, 2\)"):
        cal.guides.amortize(model, {"x": x})
    cal.guides.amortize(model, {"x": torch.as_tensor(x).permute(0, 3, 1, 2)})
    flat = x.reshape(N, -1)
    with pytest.raises(DataError, match=r"if only the shape differs, give x.reshape\(-1, 3, 8, 9\)"):
        cal.guides.amortize(model, {"x": flat})
    cal.guides.amortize(model, {"x": flat.reshape(-1, 3, 8, 9)})


def test_zeros_and_ones_are_neither_scaled_where_they_are_masks_nor_where_they_are_observed():
    bits = (GREYS > 127).astype(np.uint8)
    for given_bits in (bits, torch.from_numpy(bits)):
        data = cal.data.Data({"x": GREYS, "seen": given_bits}, {"mask": given_bits})
        observed, covariates = data.tensors()
        assert set(observed["seen"].unique().tolist()) == {0.0, 1.0}
        assert torch.equal(covariates["mask"], torch.from_numpy(bits))
        assert torch.allclose(observed["x"], torch.from_numpy(GREYS) / 255)


def test_rows_in_the_default_order_do_not_fit_those_of_a_shuffled_table():
    plain = FRAME.reset_index(drop=True)
    x, y = plain["dose"], plain["height"].sample(frac=1, random_state=0)
    with pytest.raises(DataError, match=r"y = y.loc\[x.index\]; if the rows belong together .* y.to_numpy\(\)"):
        cal.data.as_data({"x": x, "y": y})
    assert np.allclose(given(cal.data.as_data({"x": x, "y": y.loc[x.index]}), "y"), plain["height"])
    assert np.allclose(given(cal.data.as_data({"x": x, "y": y.to_numpy()}), "y"), y)
    assert cal.data.as_data(plain[["dose"]]).labels().tolist() == list(range(N))


class Negative(torch.utils.data.Subset):
    """A part of a data set with other items."""

    def __getitem__(self, index):
        return tuple(-part for part in super().__getitem__(index))

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_items_of_a_set_of_one_tensor_and_of_a_class_derived_from_subset():
    tensors = TensorDataset(torch.arange(5.0))
    assert given(cal.data.as_data(tensors), "x").tolist() == [0, 1, 2, 3, 4]
    assert given(cal.data.as_data(Negative(tensors, [3, 1])), "x").tolist() == [-3, -1]


def test_values_are_for_8_bit_images():
    with pytest.raises(DataError, match=r"values='binarised' is for 8-bit images.*\(255 \* x\).round\(\)"):
        cal.data.as_data({"x": torch.rand(3, 1, 8, 8)}, values="binarised")
    x = torch.rand(3, 1, 8, 8)
    cal.data.as_data({"x": (255 * x).round().to(torch.uint8)}, values="binarised")
    with pytest.raises(DataError, match="wanted one of unit, dequantised, binarised, thresholded, stored"):
        cal.data.as_data({"x": GREYS}, values="half")
    with pytest.raises(DataError, match="beside a Data"):
        cal.data.as_data(cal.data.as_data({"x": GREYS}), values="unit")


# -- files -------------------------------------------------------------------------------------------------------------


def test_tables_as_files(tmp_path):
    FRAME[["height", "dose"]].to_csv(tmp_path / "trial.csv")
    splits = cal.data.load(tmp_path / "trial.csv")
    labels = [label for part in splits.values() for label in part.labels()]
    assert sorted(labels) == sorted(FRAME.index)
    assert splits["train"].observed_names == ("height", "dose")
    FRAME[["name"]].to_csv(tmp_path / "text.csv")
    with pytest.raises(DataError, match=r"text.csv: 'name' holds text"):
        cal.data.load(tmp_path / "text.csv")
    with pytest.raises(DataError, match="there is no file"):
        cal.data.load(tmp_path / "none.csv")


def test_functions_in_files_return_any_form(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import pandas as pd\nimport torch\nfrom torch.utils.data import TensorDataset\n"
        "def frame():\n    return pd.DataFrame({'x': range(20)}, index=range(50, 70))\n"
        "def pairs():\n    return TensorDataset(torch.zeros(20, 3), torch.arange(20))\n"
        "def splits():\n    return dict.fromkeys(('train', 'validation', 'test'), frame())\n"
    )
    assert min(cal.data.load(f"{tmp_path}/mine.py:frame")["train"].labels()) >= 50
    assert cal.data.load(f"{tmp_path}/mine.py:pairs")["test"].observed_names == ("x", "y")
    assert len(cal.data.load(f"{tmp_path}/mine.py:splits")["test"]) == 20


def test_unknown_keys_say_how_to_rename_them():
    with pytest.raises(ProgramError, match=r"calibrant.data.as_data\(data\).select\({'SITE': 'arm'}\)"):
        cal.guides.amortize(trial, FRAME[["height", "dose", "arm"]])
    renamed = cal.data.as_data(FRAME[["height", "dose"]].rename(columns={"height": "cm"}))
    cal.guides.amortize(trial, renamed.select({"height": "cm", "dose": "dose"}))


# -- the encoder of images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "chosen"), [((1, 8, 8), "an MLP"), ((1, 33, 33), "convolutions")])
def test_the_encoder_chosen_for_images_is_told(shape, chosen):
    model = cal.models.create("vae", shape=shape, latents=2)
    data = {"x": torch.rand(N, *shape)}
    assert f"chosen: {chosen} for the image x, by its size (the encoder " in repr(cal.guides.amortize(model, data))
    assert "chosen" not in repr(cal.guides.amortize(model, data, encoder="mlp"))
    assert "chosen" not in repr(cal.guides.amortize(vector, {"x": torch.zeros(N, 2)}))
