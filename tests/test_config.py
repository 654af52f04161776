"""A bad setting is one clear error, wherever a config is constructed."""

from __future__ import annotations

import copy
import pickle

import pytest
from pydantic import Field

import issl
from issl.audit.config import Config


class Noise(Config):
    std: float = Field(0.2, ge=0)


class Crop(Config):
    area: float = Field(gt=0, le=1)


class Run(Config):
    views: tuple[Noise | Crop, ...] = (Noise(),)
    epochs: int = Field(10, ge=0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"epoch": 3}, "'epoch' .*3.* 'epochs'"),
        ({"epochs": -1}, "epochs = -1: "),
        ({"views": [{"std": 1}, {"area": 2}]}, r"views\.1\.Crop\.area = 2: "),
    ],
)
def test_every_bad_setting_is_named_with_its_path_and_value(settings: dict, named: str) -> None:
    for build in (Run.model_validate, lambda given: Run(**given)):
        with pytest.raises(issl.IsslError, match=rf"^Run: .*{named}.*\Z"):  # in one line
            build(settings)


def test_a_union_takes_the_member_that_fits_and_copies_are_equal() -> None:
    run = Run(views=[{"std": 1}, {"area": 0.5}])
    assert run.views == (Noise(std=1), Crop(area=0.5))
    pickled, validated = pickle.loads(pickle.dumps(run)), Run.model_validate(run.model_dump())
    assert run == copy.deepcopy(run) == pickled == validated
    with pytest.raises(Exception, match="frozen"):
        run.epochs = 3
