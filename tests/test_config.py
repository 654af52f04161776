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
    ("settings", "message"),
    [
        (
            {"data": DATA, "epoch": 3},
            "Run: unknown field 'epoch' (value 3); did you mean 'epochs'?",
        ),
        (
            {"data": DATA, "zzz": 3},
            "Run: unknown field 'zzz' (value 3); its fields are data, views, epochs",
        ),
        (
            {"data": DATA, "epochs": -1},
            "Run: epochs = -1: Input should be greater than or equal to 0",
        ),
        ({}, "Run: 'data' is missing; give it a value"),
        ({"data": {"split": "train"}}, "Run: 'data.name' is missing; give it a value"),
        (
            {"data": {**DATA, "spilt": "test"}},
            "Run: unknown field 'data.spilt' (value 'test'); did you mean 'split'?",
        ),
        (
            {"data": {"name": "mnist"}},
            "Run: data = {'name': 'mnist'}: name 'mnist' is not known; choose cifar10",
        ),
        (
            {"data": DATA, "views": [{"std": 1}, {"area": 2}]},
            "Run: unknown field 'views.1.Noise.area' (value 2); its fields are std; "
            "views.1.Crop.area = 2: Input should be less than or equal to 1",
        ),
        (
            {"data": 3, "epochs": "many"},
            "Run: data = 3: Input should be a valid dictionary or instance of Data; "
            "epochs = 'many': Input should be a valid integer, unable to parse string as an "
            "integer",
        ),
        (
            {"data": DATA, "epochs": "9" * 200 + "x"},
            f"Run: epochs = '{'9' * 76}...: Input should be a valid integer",
        ),
    ],
)
def test_every_bad_setting_is_named_with_its_path_value_and_remedy(
    settings: dict, message: str
) -> None:
    for build in (lambda: Run(**settings), lambda: Run.model_validate(settings)):
        with pytest.raises(issl.IsslError) as caught:
            build()
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


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
