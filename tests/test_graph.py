"""The neighbour graph, the baselines and the probe, against brute force and planted truths."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.metrics import silhouette_score

import issl
from issl.audit.stats import baselines, neighbour_graph
from issl.audit.stats.evaluate import PENALTIES, knn_hits, knn_votes, probe_hits


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
    with pytest.raises(issl.IsslError, match="k=60 neighbours among 60"):
        neighbour_graph.nearest(features, 60)


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
    with pytest.raises(issl.IsslError, match="class 1"):
        neighbour_graph.matched(labels, np.arange(20, 40), seed=1, by=degree)


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
    with pytest.raises(issl.IsslError, match="one class"):
        probe_hits(train, torch.zeros_like(labels), test, truth)
