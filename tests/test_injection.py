"""What is put into a set is what it says, where it says, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import issl
from issl.audit.data.injection import ATYPICAL, DUPLICATES, inject
from issl.data import judged_pairs, scenes


@pytest.fixture(scope="module")
def plain() -> issl.Images:
    return scenes.draw(200, exact_duplicates=0.0, near_duplicates=0.0, atypical=0.0)


def place(images: issl.Images, index: int) -> int:
    return int(np.flatnonzero(images.attributes["index"] == index)[0])


def test_duplicates_are_copies_of_their_originals(plain: issl.Images) -> None:
    mixed = inject(plain, duplicates=0.1, seed=3)
    known = mixed.attributes
    copies = known.index[known["duplicate_of"] >= 0]
    assert len(copies) == 20 and set(known["duplicate_kind"][copies]) == set(DUPLICATES)
    assert known["duplicate_of"][copies].is_unique
    for row in copies:
        original = place(mixed, known["duplicate_of"][row])
        assert known["duplicate_of"][original] == -1  # an original is never replaced
        a, b = mixed.pixels[row].float(), mixed.pixels[original].float()
        kind = known["duplicate_kind"][row]
        assert torch.equal(a, b) == (kind == "exact")
        moved = [torch.roll(b, (dy, dx), (1, 2)) for dy in range(-3, 4) for dx in range(-3, 4)]
        nearest = min(float((a - m)[:, 4:-4, 4:-4].abs().mean()) for m in moved)
        assert nearest < {"recoloured": 60, "recompressed": 30}.get(kind, 15), kind
        assert mixed.labels[row] == mixed.labels[original]
        assert torch.equal(mixed.masks[row], mixed.masks[original])
    assert (known["index"] == plain.attributes["index"]).all()


def test_the_rest_stays_as_it_was(plain: issl.Images) -> None:
    mixed = inject(plain, duplicates=0.1, atypical=0.15)
    known = mixed.attributes
    changed = (known["duplicate_of"] >= 0) | (known["atypical"] != "")
    assert changed.sum() == 20 + 30 and set(known["atypical"]) == {"", *ATYPICAL}
    untouched = torch.from_numpy(~changed.to_numpy())
    assert torch.equal(mixed.pixels[untouched], plain.pixels[untouched])
    pd.testing.assert_frame_equal(
        known[plain.attributes.columns][~changed], plain.attributes[~changed], check_dtype=False
    )
    for row in np.flatnonzero(known["atypical"] == "inverted"):
        assert torch.equal(mixed.pixels[row], 255 - plain.pixels[row])
    assert plain.attributes["duplicate_of"].eq(-1).all()  # the input is left alone


def test_foreign_images_of_real_sets_are_drawn_ones(plain: issl.Images) -> None:
    photos = issl.Images(plain.pixels, plain.labels, plain.attributes[["index"]], "photos")
    mixed = inject(photos, atypical=0.1)
    rows = np.flatnonzero(mixed.attributes["atypical"] == "foreign")
    assert len(rows) == 7 and not torch.equal(mixed.pixels[rows], photos.pixels[rows])


def test_the_seed_decides_and_shares_must_fit(plain: issl.Images) -> None:
    a, b, c = (inject(plain, 0.05, 0.05, seed) for seed in (1, 1, 2))
    assert torch.equal(a.pixels, b.pixels) and a.attributes.equals(b.attributes)
    assert not torch.equal(a.pixels, c.pixels)
    with pytest.raises(issl.IsslError, match=r"duplicates=0\.4, atypical=0\.3"):
        inject(plain, duplicates=0.4, atypical=0.3)


def test_swapped_twins_differ_by_the_background_alone() -> None:
    twins = issl.load("scenes-swapped", n=12)
    known = twins.attributes
    assert len(twins) == 48 and known["index"].is_unique
    assert known["scene"].value_counts().eq(4).all()
    kinds = known["background"].to_numpy()
    first, *others = (twins.subset(kinds == background) for background in scenes.BACKGROUNDS)
    for other in others:
        assert torch.equal(other.masks, first.masks) and torch.equal(other.labels, first.labels)
        inside = (first.masks == 255)[:, None].expand(-1, 3, -1, -1)
        assert torch.equal(other.pixels[inside], first.pixels[inside])
        assert not torch.equal(other.pixels, first.pixels)


@pytest.mark.data
def test_judged_pairs(data_root: Path) -> None:
    images = issl.load("cifair10", n=400, root=data_root)
    known = images.attributes
    test = known[known["index"] >= judged_pairs.CIFAR10_TRAIN]
    assert len(images) == 400 + 286 and len(test) == 286
    assert set(test["duplicate_kind"]) == {"near duplicate", "very similar"}
    source = issl.load("cifar10", "test", root=data_root)
    rows = test["index"].to_numpy() - judged_pairs.CIFAR10_TRAIN
    queries = images.pixels[torch.tensor(test.index.tolist())]
    assert torch.equal(queries, source.pixels[rows])
    # people called them the same: their pixels are far closer than those of two images usually
    pairs = [place(images, original) for original in test["duplicate_of"]]
    gap, other = (
        (queries.float() - images.pixels[there].float()).abs().mean((1, 2, 3)).median()
        for there in (pairs, np.roll(pairs, 1))
    )
    assert float(gap) < 0.6 * float(other)


def test_a_pair_whose_original_was_overwritten_is_none() -> None:
    images = issl.load("scenes", n=400)
    of = images.attributes["duplicate_of"].to_numpy()
    assert (of >= 0).sum() >= 3
    for seed in range(5):
        got = inject(images, duplicates=0.2, atypical=0.3, seed=seed)
        same = (got.pixels == images.pixels).flatten(1).all(1)
        now, kinds = got.attributes["duplicate_of"], got.attributes["duplicate_kind"]
        for original in of[(now == of) & (of >= 0)]:
            assert same[place(got, original)]  # it is what it was
        assert ((now >= 0) == (kinds != "")).all()
