"""Other libraries on the same task: same encoder, images, noise and loss, through their public
interfaces.

None of them knows a loss of two views, so each gets it as a user would write it, at whatever cost.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from alternate import Turn
from programs import STEM, Program, Task
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from issl import LoGra
from issl.influence.layers import scored_layers
from issl.influence.losses import stability_loss

# projection dimension of TRAK and dattri: dattri's default; TRAK's 2048 exceeds the images
PROJECTION = 512
DATTRI = 16  # images for dattri; each gradient by vmap takes a minute on a slow CPU


class Pairs(Dataset):
    """(pixels, noisy pixels) of each image; the first image of each batch hands over the turn."""

    def __init__(self, task: Task, turn: Turn):
        self.pixels, self.noisy = task.pixels(), task.noisy
        self.every, self.turn = task.batch_size, turn

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        if k % self.every == 0:
            self.turn.next()
        return self.pixels[k], self.noisy[k]


def loader(task: Task, turn: Turn) -> DataLoader:
    return DataLoader(Pairs(task, turn), task.batch_size, shuffle=False)


def kronfluence(task: Task) -> Program:
    """EK-FAC self-scores: covariances, eigenvectors, eigenvalues, scores. All steps but the
    eigenvectors take a pass over the images. Both views call the same layers, hence
    has_shared_parameters. Its default damping equals ours: 0.1 × the mean eigenvalue."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task as KronfluenceTask

    class Stability(KronfluenceTask):
        def compute_train_loss(
            self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False
        ) -> Tensor:
            return stability_loss(model(batch[0]), model(batch[1])).sum()

        def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    def program(turn: Turn) -> np.ndarray:
        model = prepare_model(copy.deepcopy(task.encoder), Stability())
        pairs = Pairs(task, turn)
        arguments = FactorArguments(
            strategy="ekfac", use_empirical_fisher=True, has_shared_parameters=True
        )
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "benchmark", model, Stability(), cpu=True, disable_tqdm=True, output_dir=folder
            )
            analyzer.fit_all_factors(
                "f", pairs, per_device_batch_size=task.batch_size, factor_args=arguments
            )
            analyzer.compute_self_scores(
                "s", "f", pairs, per_device_train_batch_size=task.batch_size
            )
            return analyzer.load_self_scores("s")["all_modules"].numpy()

    return program


def logix(task: Task, rank: int, given: LoGra | None = None) -> Program:
    """LoGra as its authors publish it, with logs kept in memory. The second view is a second call
    of each layer; LogIX adds its gradients to the first's.

    `given` is a curvature whose projections replace LogIX's own random ones.
    """
    import logix as library
    from logix.config import LoRAConfig
    from logix.utils import merge_logs

    def program(turn: Turn) -> np.ndarray:
        model = copy.deepcopy(task.encoder)
        scored = list(scored_layers(model, STEM if given else ()))
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.yaml"
            config.write_text(f"root_dir: {folder}\n")
            run = library.LogIX("benchmark", str(config))
            run.watch(model, name_filter=scored if given else None)
            run.add_lora(lora_config=LoRAConfig(init="random", rank=rank))
            if given is not None:
                for k, (name, layer) in enumerate(scored_layers(task.encoder, STEM).items()):
                    sketch = given.sketch(layer, k)
                    a, c = (model.get_submodule(f"{name}.logix_lora_{p}").weight for p in "AC")
                    a.data.copy_(sketch.p_in.reshape(a.shape))
                    c.data.copy_(sketch.p_out.T.reshape(c.shape))
            run.setup({"grad": ["log", "covariance"]})
            logs = []
            for first, (x, noisy) in enumerate(task.batches()):
                turn.next()
                ids = [str(first * task.batch_size + k) for k in range(len(x))]
                with run(data_id=ids):
                    stability_loss(model(x), model(noisy)).sum().backward()
                logs.append(run.get_log(copy=True))
            run.finalize()
            # the default, as ours: 0.1 × the mean of each layer's diagonal
            run.state.covariance_inverse(damping=None)
            return run.compute_self_influence(merge_logs(logs), hessian="raw")["influence"].numpy()

    return program


def trak(task: Task) -> Program:
    """TRAK's random projection of the whole gradient, by vmap. Its features give the self-scores
    xᵢᵀ(XᵀX + λ)⁻¹xᵢ."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    class Stability(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(
            model: nn.Module, weights: dict, buffers: dict, x: Tensor, noisy: Tensor
        ) -> Tensor:
            both = torch.stack([x, noisy])
            features = torch.func.functional_call(model, (weights, buffers), (both,))
            return stability_loss(features[:1], features[1:]).sum()

        def get_out_to_loss_grad(
            self, model: nn.Module, weights: dict, buffers: dict, batch: tuple
        ) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    def program(turn: Turn) -> np.ndarray:
        model = copy.deepcopy(task.encoder)
        weights = [f"{name}.weight" for name in scored_layers(task.encoder)]
        n = len(task.images)
        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(
                model,
                Stability(),
                n,
                folder,
                device="cpu",
                proj_dim=PROJECTION,
                use_half_precision=False,
                grad_wrt=weights,
                lambda_reg=1e-6,
                logging_level=logging.ERROR,
            )
            traker.load_checkpoint(model.state_dict(), model_id=0)
            for batch in loader(task, turn):
                traker.featurize(batch, num_samples=len(batch[0]))
            traker.finalize_features()
            store = traker.saver.current_store
            return (np.asarray(store["grads"]) * np.asarray(store["features"])).sum(1)

    return program


def dattri_trak(task: Task) -> Program:
    """Self-attribution by dattri's TRAK attributor, on the first DATTRI images only; its time is
    scaled to all images."""
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    def program(turn: Turn) -> np.ndarray:
        model = copy.deepcopy(task.encoder)

        def loss(parameters: dict, pair: tuple[Tensor, Tensor]) -> Tensor:
            features = torch.func.functional_call(model, parameters, (torch.stack(pair),))
            return stability_loss(features[:1], features[1:]).sum()

        attribution = AttributionTask(loss, model, [model.state_dict()])
        attributor = TRAKAttributor(
            attribution,
            lambda parameters, pair: torch.exp(-loss(parameters, pair)),
            regularization=1e-6,
            layer_name=[f"{name}.weight" for name in scored_layers(task.encoder)],
            projector_kwargs={
                "proj_dim": PROJECTION,
                "device": "cpu",
                "proj_max_batch_size": task.batch_size,
            },
        )
        some = task.images.subset(range(DATTRI))
        few = Task(task.encoder, some, task.noisy[:DATTRI], DATTRI // 2)
        turn.scale = len(task.images) / DATTRI
        return attributor.self_attribute(loader(few, turn)).numpy()

    return program


def programs(task: Task) -> dict[str, Program]:
    """The programs of the installed libraries, by their names in the table."""
    found: dict[str, Program] = {}
    for name, package, build in (
        ("LogIX rank 8", "logix", lambda: logix(task, 8)),
        ("LogIX rank 16", "logix", lambda: logix(task, 16)),
        ("LogIX rank 64", "logix", lambda: logix(task, 64)),
        ("LogIX rank 8, no stem, our projections", "logix", lambda: logix(task, 8, LoGra(8))),
        ("kronfluence EK-FAC", "kronfluence", lambda: kronfluence(task)),
        ("TRAK", "trak", lambda: trak(task)),
        ("dattri TRAK", "dattri", lambda: dattri_trak(task)),
    ):
        try:
            __import__(package)
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
            continue
        found[name] = build()
    return found


def versions() -> str:
    """The versions of the installed libraries, for the report."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("logix-ai", "kronfluence", "traker", "dattri"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)
