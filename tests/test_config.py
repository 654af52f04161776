"""A bad setting is one clear error, wherever a config is constructed."""

from __future__ import annotations

import copy
import pickle

import pytest
from pydantic import Field, model_validator

import issl
from issl.audit.config import Config


class Noise(Config):
    std: float = Field(0.2, ge=0)


class Crop(Config):
    area: float = Field(gt=0, le=1)


class Data(Config):
    name: str
    split: str = "train"

    @model_validator(mode="after")
    def _known(self) -> Data:
        if self.name == "mnist":
            raise ValueError(f"name {self.name!r} is not known; choose cifar10")
        return self


class Run(Config):
    data: Data
    views: tuple[Noise | Crop, ...] = (Noise(),)
    epochs: int = Field(10, ge=0)


DATA = {"name": "cifar10"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"data": DATA, "epoch": 3}, "unknown field 'epoch' (value 3); did you mean 'epochs'?"),
        ({"data": DATA, "zzz": 3}, "unknown field 'zzz' (value 3); its fields are data"),
        ({"data": DATA, "epochs": -1}, "epochs = -1: "),
        ({"data": {"split": "train"}}, "'data.name' is missing"),
        ({"data": {"name": "mnist"}}, "name 'mnist' is not known"),
        ({"data": DATA, "views": [{"std": 1}, {"area": 2}]}, "views.1.Crop.area = 2: "),
        ({"data": DATA, "epochs": "9" * 200 + "x"}, f"epochs = '{'9' * 76}...: "),
    ],
)
def test_every_bad_setting_is_named_with_its_path_and_value(settings: dict, named: str) -> None:
    for build in (lambda: Run(**settings), lambda: Run.model_validate(settings)):
        with pytest.raises(issl.IsslError) as caught:
            build()
        said = str(caught.value)
        assert said.startswith("Run: ") and named in said and "\n" not in said


def test_an_error_of_the_whole_config_names_its_class() -> None:
    with pytest.raises(issl.IsslError, match=r"^Data: name 'mnist' is not known"):
        Data(name="mnist")


def test_good_settings_are_as_pydantics() -> None:
    """A union takes the member that fits, though the first does not; copies and pickles are
    equal."""
    run = Run(data=DATA, views=[{"std": 1}, {"area": 0.5}])
    assert run.data == Data(name="cifar10") and run.views == (Noise(std=1), Crop(area=0.5))
    assert (
        run
        == copy.deepcopy(run)
        == pickle.loads(pickle.dumps(run))
        == Run.model_validate(run.model_dump())
    )
    assert Run.model_validate(run) is run
    with pytest.raises(Exception, match="frozen"):
        run.epochs = 3
