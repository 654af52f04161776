"""What is put into a set is what it says, and what people said of images is of the images that it
names; the neighbour graph, the baselines and the probe, against brute force and planted truths."""

from dataclasses import replace
from pathlib import Path

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from disk import write_cifar10
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.metrics import silhouette_score

import issl
from issl.audit.data import human_choices
from issl.audit.data.background_labels import LABELS, LISTED, background_labels, listed_backgrounds
from issl.audit.data.injection import ATYPICAL, DUPLICATES, inject
from issl.audit.data.known_duplicates import known_duplicates
from issl.audit.stats import baselines, neighbour_graph
from issl.audit.stats.evaluate import PENALTIES, knn_hits, knn_votes, probe_hits
from issl.data import judged_pairs, scenes
from issl.data.images import Images


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


def test_the_seed_decides(plain: issl.Images) -> None:
    a, b, c = (inject(plain, 0.05, 0.05, seed) for seed in (1, 1, 2))
    assert torch.equal(a.pixels, b.pixels) and a.attributes.equals(b.attributes)
    assert not torch.equal(a.pixels, c.pixels)


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
    outside = (first.masks == 0)[:, None].expand(-1, 3, -1, -1)
    assert scenes.BACKGROUNDS[0] == "white" and int(first.pixels[outside].min()) > 225


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


def black(index: np.ndarray) -> Images:
    """Images that are named as CIFAR-10's."""
    pixels = torch.zeros(len(index), 3, 8, 8, dtype=torch.uint8)
    return Images(pixels, None, pd.DataFrame({"index": index}), "cifar10")


def test_labels_of_backgrounds_are_of_the_samples_drawn_and_follow_their_images() -> None:
    table = pd.read_csv(LABELS, keep_default_na=False).set_index("index")
    listed = pd.read_csv(LISTED).set_index("index")
    for seed, found in ((20261125, table.index), (20261129, listed.index[listed["random"] == 1])):
        drawn = np.random.default_rng(seed).permutation(50_000)[: len(found)]
        assert len(found) >= 100 and sorted(found) == sorted(drawn)
    assert ((table["colour"] == "") == (table["uniform"] == "no")).all()
    index = np.random.default_rng(0).permutation(50_000)[:3000]
    images = black(index)
    known, ends = background_labels(images), listed_backgrounds(images)
    assert known is not None and len(known) == np.isin(index, table.index).sum() > 5
    own = table.loc[index[known["position"]]]
    assert known["colour"].tolist() == own["colour"].tolist()
    assert known["uniform"].tolist() == own["uniform"].eq("yes").tolist()
    assert ends is not None and len(ends) == np.isin(index, listed.index).sum() > 5
    own = listed.loc[index[ends.index], "background"]
    assert ends["plain"].tolist() == own.eq("plain").tolist()
    assert ends["smooth"].tolist() == own.ne("no").tolist()
    assert background_labels(images, "test") is None
    assert background_labels(replace(images, name="fairface")) is None


def test_the_truth_of_scenes_is_known_but_of_atypical_ones() -> None:
    scenes = inject(issl.load("scenes", n=200), atypical=0.1)
    known, truth = background_labels(scenes), scenes.attributes
    assert known is not None and len(known) == (truth["atypical"] == "").sum() < 200
    of = truth.iloc[known["position"].to_numpy()]
    assert known["uniform"].tolist() == of["uniform"].tolist()
    assert known["colour"][known["uniform"]].isin(["white", "black", "other"]).all()
    assert (known["colour"][~known["uniform"]] == "").all()
    assert set(of["background"][(known["colour"] == "white").to_numpy()]) == {"white"}


def test_of_a_group_the_first_image_is_the_original() -> None:
    pairs = pd.read_csv(LABELS.with_name("cifar10_duplicates.csv")).query("same == 'yes'")
    index = np.unique([*pairs[["a", "b"]].to_numpy().ravel(), 7])
    images = black(index)
    known = known_duplicates(images).set_axis(index)
    assert known.loc[22535].tolist() == [41, "pair"]
    assert known.loc[13647].tolist() == [119, "series"]
    assert known.loc[[41, 7, 119], "duplicate_of"].eq(-1).all()
    # what was overwritten is in no pair, and another split has other images
    overwritten = images.attributes.assign(atypical=np.where(index == 41, "inverted", ""))
    known = known_duplicates(replace(images, attributes=overwritten))
    assert known["duplicate_of"].ne(41).all()
    assert known_duplicates(images, "test")["duplicate_of"].eq(-1).all()


def test_ambiguity_is_the_entropy_of_what_people_chose_of_the_image(tmp_path: Path) -> None:
    write_cifar10(tmp_path, 20, 30)
    counts = np.zeros(human_choices.SHAPE, np.int64)
    counts[:, 0], counts[:, 1] = 2, 1  # two in three agree
    counts[0], counts[1] = [0, 3] + [0] * 8, [1, 1, 1] + [0] * 7  # one is clear, one is not
    (tmp_path / "cifar10h").mkdir()
    np.save(tmp_path / human_choices.FILE, counts)
    images = issl.load("cifar10", split="test", root=tmp_path)
    found = human_choices.ambiguity(images, tmp_path)
    assert found[:2] == pytest.approx([0, np.log(3)])
    assert found[2:] == pytest.approx(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    some = images.subset([5, 1, 0])
    np.testing.assert_array_equal(human_choices.ambiguity(some, tmp_path), found[[5, 1, 0]])
    with pytest.raises(issl.IsslError, match="scenes"):
        human_choices.ambiguity(issl.load("scenes", n=16), tmp_path)
    beyond = images.attributes.assign(index=images.attributes["index"] + 9990)
    with pytest.raises(issl.IsslError, match="index 10000"):
        human_choices.ambiguity(replace(images, attributes=beyond), tmp_path)


@pytest.mark.data
def test_most_people_see_the_class_that_an_image_is_labelled_with(data_root: Path) -> None:
    """So the order of the counts is the test set's own."""
    if human_choices.missing("cifar10", data_root):
        pytest.skip(human_choices.missing("cifar10", data_root))
    counts = human_choices.read(data_root)
    assert counts.sum(1).min() >= 47 and counts.sum(1).max() <= 63
    images = issl.load("cifar10", split="test", root=data_root)
    assert (counts.argmax(1) == images.require_labels().numpy()).mean() > 0.98


def graph(features: torch.Tensor, k: int) -> sparse.csr_array:
    return neighbour_graph.knn_graph(neighbour_graph.nearest(features, k)[0])


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


def test_nearest_is_brute_force(features: torch.Tensor) -> None:
    places, distances = neighbour_graph.nearest(features, 3)
    full = cdist(features, features, "cosine")
    np.fill_diagonal(full, np.inf)
    np.testing.assert_array_equal(places, np.argsort(full, 1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(full, 1)[:, :3], atol=1e-6)


def test_modularity_and_spectrum_are_networkxs(features: torch.Tensor) -> None:
    net, labels = graph(features, 5), np.arange(60) % 3
    peer = networkx.from_scipy_sparse_array(net)
    classes = [set(range(c, 60, 3)) for c in range(3)]
    want = networkx.community.modularity(peer, classes)
    assert neighbour_graph.modularity(net, labels) == pytest.approx(want)
    values, vectors = neighbour_graph.spectrum(net, 6)
    laplacian = networkx.normalized_laplacian_matrix(peer).toarray()
    np.testing.assert_allclose(values, np.linalg.eigvalsh(laplacian)[:6], atol=1e-8)
    np.testing.assert_allclose(laplacian @ vectors, vectors * values, atol=1e-6)


def test_separability_is_the_silhouette(features: torch.Tensor) -> None:
    labels = np.arange(60) % 3
    for own in (1, 9):  # in class 9 it is alone
        labels[7] = own
        peer = silhouette_score(features.numpy(), labels, metric="cosine")
        assert neighbour_graph.separability(features, labels) == pytest.approx(peer, abs=1e-6)


def test_the_share_of_neighbours_kept_is_counted(features: torch.Tensor) -> None:
    other = torch.randn(60, 8, generator=torch.Generator().manual_seed(4))
    a, b = (neighbour_graph.nearest(f, 5)[0] for f in (features, other))
    want = [len({*a[i]} & {*b[i]}) / 5 for i in range(60)]
    np.testing.assert_allclose(neighbour_graph.neighbours_kept(features, other, 5), want)


def test_the_share_of_cross_class_edges_is_counted(features: torch.Tensor) -> None:
    net, labels = graph(features, 12), np.arange(60) % 3
    assert (net != net.T).nnz == 0 and net.diagonal().sum() == 0
    i, j = net.nonzero()
    want = [np.mean(labels[j[i == k]] != labels[k]) for k in range(60)]
    np.testing.assert_allclose(neighbour_graph.cross_class_share(net, labels), want)


@pytest.mark.parametrize("k", [1, 4])
def test_betweenness_is_the_share_of_shortest_paths(features: torch.Tensor, k: int) -> None:
    """Of the nearest neighbour alone the graph is in pieces."""
    net = graph(features, k)
    peer = networkx.from_scipy_sparse_array(net)
    exact = networkx.betweenness_centrality(peer)
    np.testing.assert_allclose(neighbour_graph.betweenness(net), [*exact.values()], atol=1e-15)
    chosen = np.random.default_rng(1).choice(60, 20, replace=False)
    # each pair counts half
    paths = networkx.betweenness_centrality_subset(peer, chosen.tolist(), list(range(60)))
    want = [2 * paths[v] / ((20 - (v in chosen)) * 58) for v in range(60)]
    np.testing.assert_allclose(neighbour_graph.betweenness(net, 20, seed=1), want, atol=1e-15)


def test_matched_controls() -> None:
    labels, degree = np.repeat([0, 1, 2], 20), np.random.default_rng(0).integers(1, 6, 60)
    chosen = np.array([0, 1, 25, 45, 46, 47])
    for by in (np.zeros(60), degree):
        controls = neighbour_graph.matched(labels, chosen, seed=1, by=by)
        assert (labels[controls] == labels[chosen]).all() and not set(controls) & set(chosen)
    for i, j in zip(chosen, controls, strict=True):
        pool = [k for k in range(60) if labels[k] == labels[i] and k not in chosen]
        assert abs(degree[j] - degree[i]) == min(abs(degree[k] - degree[i]) for k in pool)


def test_baselines_find_what_is_planted(features: torch.Tensor) -> None:
    far = torch.cat([features.abs(), -20 * torch.ones(1, 8)])
    assert baselines.knn_distance(far).argmax() == 60 and baselines.isolation(far).argmax() == 60


def test_pixel_baselines() -> None:
    images = issl.load("scenes", n=40)
    pixels = images.pixels.clone()
    pixels[7] = pixels[3]
    pixels[9] = (0.9 * pixels[4].float()).byte()
    images = issl.Images(pixels, images.labels, images.attributes, "scenes")
    by_pixels, by_hash = baselines.pixel_closeness(images), baselines.hash_closeness(images)
    flat = pixels.flatten(1).double().numpy() / 255
    full = cdist(flat, flat)
    np.fill_diagonal(full, np.inf)
    np.testing.assert_allclose(by_pixels, -full.min(1) / np.sqrt(flat.shape[1]), atol=1e-3)
    assert by_pixels[3] == by_pixels[7] == pytest.approx(0, abs=1e-3)
    assert by_hash[3] == by_hash[7] == 0 and by_hash[4] >= -6 and by_hash.min() < -6


def test_votes_and_prototypes_tell_which_images_lie_between_classes() -> None:
    """Two tight classes along the axes: an image on an axis is sure, one on the diagonal is not."""
    turned = torch.linspace(-0.02, 0.02, 40)
    axis = torch.stack([turned.cos(), turned.sin()], 1)
    train, labels = torch.cat([axis, axis.flip(1)]), torch.arange(2).repeat_interleave(40)
    asked = torch.tensor([[5.0, 0.0], [0.0, 0.1], [1.0, 1.0]])
    distance = baselines.prototype_distance(asked, train, labels)
    np.testing.assert_allclose(distance, [0, 0, 1 - np.sqrt(0.5)], atol=1e-4)
    entropy = baselines.vote_entropy(knn_votes(train, labels, asked, k=80))
    np.testing.assert_allclose(entropy, [0, 0, np.log(2)], atol=1e-2)


def test_edges_to_other_classes_that_are_chosen() -> None:
    """In a square 0-1-3-2-0 with the classes a, a, b, b."""
    square = networkx.to_scipy_sparse_array(networkx.cycle_graph([0, 1, 3, 2]), range(4))
    labels = np.array([0, 0, 1, 1])
    share = neighbour_graph.share_of_cross(square, labels, lambda of, to: (to == 2) | (of == 3))
    np.testing.assert_array_equal(share, [1, 0, 0, 1])  # of 0 to 2, and of 3 to 1
    alone = neighbour_graph.share_of_cross(square, np.zeros(4, int), lambda _, to: to >= 0)
    assert np.isnan(alone).all()


def clusters(n: int, seed: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes around the axes of a space of 16 dimensions, of which one is much larger."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=generator)
    centres = 4 * torch.nn.functional.one_hot(labels, 16)
    x = centres + noise * torch.randn(n, 16, generator=generator)
    return x * torch.tensor([100.0] + [1.0] * 15), labels


def test_knn_is_brute_force() -> None:
    (train, labels), (test, truth) = clusters(60, 0, 2.0), clusters(30, 1, 2.0)
    votes = torch.zeros(30, 10)
    for x, own in zip(test, votes, strict=True):
        s, near = torch.nn.functional.cosine_similarity(x[None], train).topk(7)
        own.index_add_(0, labels[near], (s / 0.1).exp())
    shares = votes / votes.sum(1, keepdim=True)
    torch.testing.assert_close(knn_votes(train, labels, test, k=7), shares)
    got, want = knn_hits(train, labels, test, truth, k=7), (votes.argmax(1) == truth).numpy()
    np.testing.assert_array_equal(got, want)
    assert 0 < got.sum() < 30
    # in parts or at once, and with more neighbours asked for than there are
    many = knn_hits(train, labels, test.repeat(50, 1), truth.repeat(50), k=7)
    np.testing.assert_array_equal(many, np.tile(want, 50))
    assert len(knn_hits(train, labels, test, truth, k=1000)) == 30


def test_probe_finds_linear_classes_and_chooses_its_penalty_without_the_test_set() -> None:
    (train, labels), (test, truth) = clusters(800, 0, 0.5), clusters(300, 1, 0.5)
    hits, c = probe_hits(train, labels, test, truth)
    assert hits.mean() > 0.98 and c in PENALTIES
    wrong = (truth + 1) % 10
    again, same = probe_hits(train, labels, test, wrong)
    assert same == c and again.mean() < 0.02  # the same model, whatever the truth is said to be
