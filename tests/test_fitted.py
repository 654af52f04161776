"""A curvature that is kept: fitted once, written, added up, and used for other images; and large
sets in parts."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from disk import encoder
from nets import make, pictures
from safetensors.torch import save_file
from torch import nn

import issl
from issl import EKFAC, Diagonal, Exact, GaussianNoise, Identity, LoGra, cli
from issl.engine import Engine, Task
from issl.influence import reference
from issl.influence.kept import HEADER
from issl.influence.losses import CrossEntropy
from issl.influence.parts import Scoring, score_in_parts
from issl.influence.scorer import Measurement

PCA = LoGra(3, projection="pca", fit=20)


def same(a: pd.DataFrame, b: pd.DataFrame, rtol: float = 0.0) -> None:
    assert list(a) == list(b)
    np.testing.assert_allclose(a.to_numpy(), b.to_numpy(), rtol=rtol)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("curvature", [LoGra(3), PCA, EKFAC(fit=10), Diagonal(), Exact()], ids=repr)
def test_fit_then_score_is_self_influence(curvature, draws, tmp_path: Path, monkeypatch) -> None:
    """Exact's many columns make the other side take its Gram form."""
    net, images = make("batchnorm"), pictures(90)
    want = issl.self_influence(net, images, curvature=curvature, seed=3, draws=draws, sweep=[0.5])
    fitted = issl.fit(net, images, curvature=curvature, seed=3, draws=draws)
    same(fitted.score(images, sweep=[0.5]), want, rtol=1e-8)
    fitted.save(tmp_path / "c.safetensors")
    monkeypatch.setattr("issl.influence.curvature.random_rows", None)  # another torch draws others
    opened = issl.load_fitted(tmp_path / "c.safetensors", net)
    same(opened.score(images, sweep=[0.5]), fitted.score(images, sweep=[0.5]))


def test_cross_and_top_are_those_of_the_whole(tmp_path: Path) -> None:
    """Also after noise of each channel was written and read."""
    net, images, query = make("residual"), pictures(40), pictures(5, seed=2)
    noise = GaussianNoise.of_normalised((0.2, 0.3, 0.4))
    issl.fit(net, images, noise, LoGra(4)).save(tmp_path / "c.safetensors")
    fitted = issl.load_fitted(tmp_path / "c.safetensors", net)
    want = issl.cross_influence(net, images, query, noise, LoGra(4))
    torch.testing.assert_close(fitted.cross(images, query), want, rtol=1e-12, atol=0)
    top = issl.top_influences(net, images, query, 3, noise, LoGra(4))
    pd.testing.assert_frame_equal(fitted.top(images, query, 3), top)
    few = images.subset(range(10, 20))  # other images, the same curvature
    torch.testing.assert_close(fitted.cross(few, query), want[:, 10:20], rtol=1e-12, atol=0)
    assert issl.fit(net, pictures(5, seed=5), noise, LoGra(4)).add(fitted).n == 45


def test_new_images_by_the_formula() -> None:
    """g (H + λ)⁻¹ g of images that are not in H, from one-image gradients."""
    net, images, new = make("stride"), pictures(30), pictures(7, seed=5)
    fit, rows = (reference.gradients(net, s, GaussianNoise().keyed(0))[1] for s in (images, new))
    want = torch.zeros(7, dtype=torch.float64)
    for layer in fit:
        g, r = fit[layer].flatten(1), rows[layer].flatten(1)
        h = g.T @ g / len(g)
        h += 0.1 * h.diagonal().mean() * torch.eye(len(h))
        want += (r * torch.linalg.solve(h, r.T).T).sum(1)
    got = issl.fit(net, images, curvature=Exact(0.1)).score(new)["influence"]
    np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize("curvature", [LoGra(3), Diagonal(), Exact()], ids=repr)
@pytest.mark.parametrize("draws", [1, 3])
def test_parts_add_up_to_the_whole(curvature, draws: int) -> None:
    net, images = make("batchnorm"), pictures(60)
    parts = [images.subset(range(*ends)) for ends in ((0, 11), (11, 40), (40, 60))]
    a, b, c = (issl.fit(net, part, curvature=curvature, draws=draws) for part in parts)
    whole = issl.fit(net, images, curvature=curvature, draws=draws)
    b = replace(b, bases={name: x + 1e-7 for name, x in b.bases.items()})  # rounded elsewhere
    for added in (c.add(a).add(b), a.extend(parts[1]).extend(parts[2])):
        assert added.n == 60
        same(added.score(images), whole.score(images), rtol=1e-10)


def test_bases_from_images_are_extended_and_not_added() -> None:
    net, images = make("batchnorm"), pictures(40)
    a, b = (issl.fit(net, images.subset(range(k, k + 20)), curvature=EKFAC()) for k in (0, 20))
    with pytest.raises(issl.IsslError, match="different bases"):
        a.add(b)
    more = a.extend(images.subset(range(20, 40)))
    for name, total in more.sums.items():  # a rotation of a gradient keeps its length
        want = issl.fit(net, images, curvature=Diagonal()).sums[name]
        assert float(total.sum()) == pytest.approx(float(want.sum()), rel=1e-9)


def test_a_loss_and_a_perturbation_of_ones_own(tmp_path: Path) -> None:
    def erase(x, index):
        return x * (torch.arange(x.shape[-1]) > 3)

    net, path = make("stride"), tmp_path / "c.safetensors"
    images = replace(pictures(30), labels=torch.arange(30) % 5)
    fitted = issl.fit(net, images, erase, loss=CrossEntropy())
    want = issl.self_influence(net, images, erase, loss=CrossEntropy())
    same(fitted.score(images), want, rtol=1e-8)
    fitted.save(path)
    for given, named in ((None, "erase.* perturbation="), (GaussianNoise(), "erase.*Gaussian")):
        with pytest.raises(issl.IsslError, match=named):
            issl.load_fitted(path, net, perturbation=given)
    same(issl.load_fitted(path, net, perturbation=erase).score(images), fitted.score(images))


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    net, names = make("batchnorm"), ("good", "old", "broken")
    files = {name: tmp_path / f"{name}.safetensors" for name in names}
    fitted = issl.fit(net, pictures(20), curvature=LoGra(4))
    fitted.save(files["good"])
    save_file({"a": torch.zeros(1)}, files["old"], {HEADER: json.dumps({"version": 3})})
    files["broken"].write_bytes(files["good"].read_bytes()[:-50])
    other, darker = make("batchnorm"), make("batchnorm")
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    darker.forward = lambda x: nn.Sequential.forward(darker, x - 0.5)
    for name, given, curvature, message in [
        ("good", other, None, "another encoder"),
        ("good", darker, None, "other numbers of the images"),
        ("old", net, None, "version 3"),
        ("broken", net, None, "curvature file .* is damaged"),
        ("good", net, LoGra(5), "curvature is .*4.* in one and .*5"),
    ]:
        with pytest.raises(issl.IsslError, match=message):
            issl.load_fitted(files[name], given, curvature=curvature)
    second = issl.fit(net, pictures(20, seed=1), curvature=LoGra(4), seed=1)
    with pytest.raises(issl.IsslError, match="seed is 0 in one and 1"):
        fitted.add(second)


def test_what_cannot_be_done() -> None:
    net = make("stride")
    net.forward = lambda x: nn.Sequential.forward(net, x)  # so it is scored itself, and not a copy
    fitted = issl.fit(net, pictures(20))
    assert (fitted.score(pictures(4))["influence"] > 0).all()
    # whose gradient's second moment takes terabytes
    large = nn.Sequential(nn.Flatten(), nn.Linear(432, 3000)).eval()
    for named, attempt in {
        r"same 20 images of random pictures": lambda: fitted.add(fitted),
        r"\(16, 16\) px": lambda: fitted.score(pictures(4, side=16)),
        r"sums nothing": lambda: issl.fit(large, pictures(4), curvature=Identity()),
        r"take .* GB": lambda: issl.fit(large, pictures(4), curvature=Exact()),
    }.items():
        with pytest.raises(issl.IsslError, match=named):
            attempt()
    with torch.no_grad():
        net[0].weight.mul_(2)
    with pytest.raises(issl.IsslError, match="other features than when it was fitted"):
        fitted.score(pictures(4))


WHAT = Measurement(GaussianNoise(), LoGra(4))


def load(what: Measurement = WHAT, seed: int = 0, kept: Path | None = None) -> Scoring:
    return Scoring(make("residual"), pictures(53, seed=seed), what, kept=kept)


def tasks_of(folder: Path, **other: Any) -> dict[str, Task]:
    return score_in_parts(folder, partial(load, **other), fit_part=20, score_part=8)


def same_as_whole(folder: Path) -> None:
    table = pd.read_parquet(folder / "scores")  # any reader of parquet data sets joins them
    want = issl.self_influence(make("residual"), pictures(53), WHAT.perturbation, WHAT.curvature)
    assert table["index"].tolist() == want["index"].tolist()
    for column in ("influence", "stability_loss", "grad_norm"):
        np.testing.assert_allclose(table[column], want[column], rtol=1e-9)


def test_parts_give_the_scores_of_the_whole_and_are_not_computed_again(tmp_path: Path) -> None:
    """Three of the fit, their sum, seven of the scores, the last of them in two processes."""
    run = Engine().run(tasks_of(tmp_path))
    for _ in range(6):  # three parts fitted, their sum, two parts scored
        next(run)
    run.close()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*.*")}
    rest = tasks_of(tmp_path)
    assert len(written) == 5 and set(rest) == {f"scores/{k:05}" for k in range(2, 7)}
    assert not any(end.error for end in Engine(2).run(rest))
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert tasks_of(tmp_path) == {}
    same_as_whole(tmp_path)
    other = tasks_of(tmp_path / "other", kept=tmp_path / "curvature.safetensors")
    assert len(other) == 7 and not any(end.error for end in Engine().run(other))
    same_as_whole(tmp_path / "other")


def test_a_folder_belongs_to_one_measurement(tmp_path: Path) -> None:
    tasks_of(tmp_path)
    for other in ({"what": replace(WHAT, seed=1)}, {"seed": 1}):
        with pytest.raises(issl.IsslError, match="holds scores of another"):
            tasks_of(tmp_path, **other)
    with pytest.raises(issl.IsslError, match="bases from images"):
        tasks_of(tmp_path / "new", what=replace(WHAT, curvature=EKFAC()))


def test_the_command_fills_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = str(tmp_path / "all"), str(tmp_path / "one.parquet")
    given = "influence --data scenes --n 12 --rank 2 --device cpu --encoder".split()
    given += [encoder(tmp_path / "e.safetensors"), "--out"]
    for out in (folder, file, folder):
        capsys.readouterr()
        assert cli.main([*given, out]) == 0
    assert "0 of 0 missing parts made" in capsys.readouterr().out
    one, parts = (pd.read_parquet(path) for path in (file, tmp_path / "all/scores"))
    pd.testing.assert_frame_equal(one, parts, rtol=1e-6)
