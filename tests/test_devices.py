"""The machine: precision, GPUs that cannot be used, memory that runs out or is limited."""

from pathlib import Path

import nets
import numpy as np
import pytest
import torch

import issl
from issl import devices, measures
from issl.devices import Batches, free_memory, full_precision, pick_device
from issl.influence.scorer import Computing
from issl.influence.scores import self_influence

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.mark.skipif(not NEW, reason="this torch has only the old names")
def test_full_precision_is_that_of_the_block_alone() -> None:
    cudnn = torch.backends.cudnn
    places = torch.backends.cuda.matmul, cudnn.conv
    with full_precision():  # the outer one restores what is changed here
        cudnn.deterministic = False
        for place in places:
            place.fp32_precision = "tf32"
        with pytest.raises(ZeroDivisionError), full_precision():
            assert [place.fp32_precision for place in places] == ["ieee"] * 2
            assert cudnn.deterministic and not cudnn.benchmark
            raise ZeroDivisionError
        assert [place.fp32_precision for place in places] == ["tf32"] * 2
        assert not cudnn.deterministic


def test_a_gpu_that_torch_cannot_use_is_named(tmp_path: Path, monkeypatch) -> None:
    """Unless it is hidden on purpose, or a container has the driver without the GPU."""
    gpu = tmp_path / "nvidia0"
    gpu.touch()
    monkeypatch.setattr(devices, "NODES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(issl.IsslError, match="nvidia0"):
        pick_device("auto")
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert pick_device("auto").type == "cpu"
    gpu.rename(gpu.with_name("nvidiactl"))
    assert pick_device("auto").type == "cpu"


def test_where_the_gpus_memory_runs_out_batches_are_halved() -> None:
    sizes = []

    def run(part: slice) -> list[int]:
        sizes.append(part.stop - part.start)
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError
        return list(range(part.start, part.stop))

    batches = Batches(8)
    parts = list(batches(slice(2, 21), run))
    assert [i for part in parts for i in part] == list(range(2, 21))
    assert sizes == [8, 4, *[2] * 9, 1]
    assert list(batches(slice(0, 3), run)) == [[0, 1], [2]]  # it remembers

    def never(_: slice) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(issl.IsslError, match="one image"):
        list(Batches(4)(slice(0, 4), never))


def test_scores_and_features_survive_it() -> None:
    net, images = nets.make("batchnorm", torch.float32), nets.pictures(12)
    how, failures = Computing(batch_size=12), []
    whole = self_influence(net, images, computing=how)["influence"]
    features = measures.embed(net, images)

    def crowded(_: object, args: tuple[torch.Tensor]) -> None:
        if len(args[0]) > 8:
            failures.append(len(args[0]))
            raise torch.OutOfMemoryError

    net[0].register_forward_pre_hook(crowded)
    again = self_influence(net, images, computing=how)["influence"]
    np.testing.assert_allclose(again, whole, rtol=1e-5)
    torch.testing.assert_close(measures.embed(net, images), features)
    assert len(failures) >= 2


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(version: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    monkeypatch.setattr(devices, "OWN_CGROUP", tmp_path / "own")
    assert 10**6 < free_memory() < 10**14  # no cgroups: the machine's
    own, root, limit, usage = {
        1: ("4:memory", tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("0:", tmp_path, "memory.max", "memory.current"),
    }[version]
    (tmp_path / "own").write_text(f"{own}:/slurm/job\n")
    for name, most, now in (("slurm", 1_000_000, 400_000), ("slurm/job", 9_000_000, 100_000)):
        (root / name).mkdir(parents=True)
        (root / name / limit).write_text(f"{most}\n")
        (root / name / usage).write_text(f"{now}\n")
    assert free_memory() == 600_000  # the limit above the own one is tighter
    (root / "slurm/memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert free_memory() == 650_000
    (root / "slurm" / limit).write_text("max" if version == 2 else "1000000000000000")
    assert free_memory() == 8_900_000
