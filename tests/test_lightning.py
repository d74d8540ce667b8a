"""Lightning's Trainer trains flows, guides and Pyro models; a resumed run is bit-equal to the uninterrupted one."""

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip(
    "lightning", reason="the adapter is an extra: pip install 'pyro-flowkit[lightning]'"
)

from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402

import pyro_flowkit  # noqa: E402
from pyro_flowkit import SplineFlow  # noqa: E402
from pyro_flowkit.guides import AutoSplineFlow  # noqa: E402
from pyro_flowkit.lightning import FlowModule, RowLoader, _check_version  # noqa: E402
from pyro_flowkit.training.data import RowBatches  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning on PyTorch 2.13
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

ROWS, DIM = 60, 2


@pytest.fixture(autouse=True)
def quiet():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return 1.0 + torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))


def trainer(epochs: int = 4, **options) -> "lightning.Trainer":
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, "log_every_n_steps": 1, **quiet, **options}
    return lightning.Trainer(max_epochs=epochs, accelerator="cpu", **options)


def mean_model(x: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([DIM]).to_event(1))
    with pyro.plate("data", ROWS, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)


def scale_model(x: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([DIM]).to_event(1))
    scale = pyro.param("noise.scale", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("data", ROWS, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(mu, scale).to_event(1), obs=x)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(DIM, 4), nn.BatchNorm1d(4), nn.Dropout(0.2))
        self.decoder = nn.Linear(1, DIM)
        self.head = nn.Linear(4, 2)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encoder)
        pyro.module("head", self.head)
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            loc, log_scale = self.head(self.encoder(x)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def density(x: torch.Tensor) -> FlowModule:
    flow = SplineFlow(DIM, num_transforms=2, hidden_dims=[8], dropout=0.1)
    return FlowModule(flow, example=x[:10], lr=1e-2, scheduler="cosine")


def spline_guide(x: torch.Tensor) -> FlowModule:
    guide = AutoSplineFlow(mean_model, num_transforms=1, hidden_dims=[8])
    return FlowModule(mean_model, guide, example=x[:10], data_size=ROWS, num_particles=2)


def normal_guide(x: torch.Tensor) -> FlowModule:
    return FlowModule(scale_model, AutoNormal(scale_model), example=x[:10], data_size=ROWS, lr=1e-2)


def vae(x: torch.Tensor) -> FlowModule:
    program = VAE()
    return FlowModule(program.model, program.guide, example=x[:10], data_size=ROWS, lr=1e-2)


def shuffled(x: torch.Tensor) -> DataLoader:
    return DataLoader(TensorDataset(x), batch_size=10, shuffle=True)


def row_loader(x: torch.Tensor) -> RowLoader:
    return RowLoader(x, 10, seed=3)


class KilledError(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise KilledError


AT_EPOCH_ENDS = {"every_n_epochs": 1, "save_on_train_epoch_end": True}


def train(
    build: Callable[[torch.Tensor], FlowModule],
    loader: Callable,
    x: torch.Tensor,
    folder: Path,
    checkpoints: dict,
    *,
    seed: int,
    kill_at: int | None = None,
    checkpoint: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Trains as a new process would; returns the final state, or an empty one if killed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    module = build(x)
    callbacks: list[Callback] = [ModelCheckpoint(folder, save_top_k=-1, **checkpoints)]
    if kill_at is not None:
        callbacks.append(KillAt(kill_at))
    running = trainer(callbacks=callbacks, enable_checkpointing=True)
    held_out = DataLoader(TensorDataset(x[:20]), batch_size=10)
    try:
        running.fit(module, loader(x), held_out, ckpt_path=checkpoint, weights_only=True)
    except KilledError:
        return {}
    assert running.global_step == 24
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


MID_EPOCH = {"every_n_train_steps": 5}  # 6 steps are an epoch


@pytest.mark.parametrize(
    ("build", "loader", "checkpoints", "kill_at", "step"),
    [
        (density, shuffled, AT_EPOCH_ENDS, 15, 12),
        (density, row_loader, AT_EPOCH_ENDS, 15, 12),
        (density, row_loader, {"every_n_train_steps": 6}, 13, 12),
        (density, row_loader, MID_EPOCH, 17, 15),
        (spline_guide, shuffled, AT_EPOCH_ENDS, 15, 12),
        (spline_guide, row_loader, MID_EPOCH, 17, 15),
        (normal_guide, row_loader, MID_EPOCH, 17, 15),
        (vae, row_loader, MID_EPOCH, 17, 15),
    ],
)
def test_a_resumed_run_is_bit_equal(build, loader, checkpoints, kill_at, step, x, tmp_path):
    whole = train(build, loader, x, tmp_path / "whole", checkpoints, seed=1)
    killed = train(build, loader, x, tmp_path / "parts", checkpoints, seed=1, kill_at=kill_at)
    assert killed == {}
    (newest,) = (tmp_path / "parts").glob(f"*step={step}.ckpt")
    resumed = train(build, loader, x, newest.parent, checkpoints, seed=99, checkpoint=newest)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_runs_of_different_seeds_differ(x, tmp_path):
    one, other = (
        train(normal_guide, row_loader, x, tmp_path / str(seed), AT_EPOCH_ENDS, seed=seed)
        for seed in (1, 99)
    )
    assert all(not torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_can_be_loaded_without_a_trainer(x, tmp_path):
    trained = train(normal_guide, row_loader, x, tmp_path, AT_EPOCH_ENDS, seed=1)
    pyro.clear_param_store()
    (last,) = tmp_path.glob("*step=24.ckpt")
    module = FlowModule.load_from_checkpoint(
        last,
        weights_only=True,
        model=scale_model,
        guide=AutoNormal(scale_model),
        example=x[:10],
        data_size=ROWS,
    )
    assert all(torch.equal(trained[k], v) for k, v in module.state_dict().items())
    scale = pyro.param("noise.scale").detach()
    assert torch.equal(scale, trained["store.noise/scale"].exp())


def test_a_checkpoint_of_another_module_is_refused(x):
    with pytest.raises(ValueError, match="Expected a checkpoint of a FlowModule, format 1, got N"):
        density(x).on_load_checkpoint({"state_dict": {}})


def test_loading_leaves_the_random_numbers_alone_unless_training_goes_on(x):
    module, content = density(x), {}
    module.on_save_checkpoint(content)
    before = torch.random.get_rng_state()
    torch.rand(5)
    after = torch.random.get_rng_state()
    module.on_load_checkpoint(content)
    assert torch.equal(torch.random.get_rng_state(), after)
    assert not torch.equal(before, after)


def test_conjugate_gaussian_reaches_the_exact_posterior(x):
    guide = AutoNormal(mean_model)
    module = FlowModule(
        mean_model, guide, example=x, data_size=ROWS, num_particles=8, lr=0.1, scheduler="cosine"
    )
    running = trainer(epochs=120)
    running.fit(module, RowLoader(x))
    variance = 1.0 / (1.0 + ROWS)
    quantiles = guide.quantiles([0.1587, 0.5, 0.8413])["mu"]
    low, mid, high = quantiles
    assert torch.allclose(mid, variance * x.sum(0), atol=0.2 * math.sqrt(variance))
    assert torch.allclose((high - low) / 2, torch.full((DIM,), math.sqrt(variance)), rtol=0.1)
    cov = torch.eye(ROWS, dtype=torch.float64) + 1.0
    evidence = dist.MultivariateNormal(torch.zeros(ROWS, dtype=torch.float64), cov)
    exact = float(evidence.log_prob(x.double().T).sum())
    assert float(running.callback_metrics["elbo"]) == pytest.approx(exact / ROWS, abs=0.02)


def test_objective_is_per_datum_of_the_whole_data(x):
    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(DIM))
        with pyro.plate("data", 10 * ROWS, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    module = FlowModule(model, example=x, data_size=10 * ROWS)
    (result,) = trainer().validate(module, RowLoader(x), verbose=False)
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum(1).mean()
    assert result["validation"] == pytest.approx(float(expected), rel=1e-5)


def test_validation_has_the_same_noise_every_time_and_leaves_the_global_noise_alone(x):
    module, loader = spline_guide(x), RowLoader(x, 20)
    before = torch.random.get_rng_state()
    first = trainer().validate(module, loader, verbose=False)
    loader.set_epoch(0)
    assert trainer().validate(module, loader, verbose=False) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_noise_differs_between_steps_and_ranks_and_repeats_with_the_seed(x, monkeypatch):
    def draw(module: FlowModule, *key: int) -> float:
        with module._noise(*key):
            return float(torch.rand(()))

    flow = SplineFlow(DIM)
    module = FlowModule(flow, example=x, seed=5)
    draws = [draw(module, 0, step) for step in range(3)] + [draw(module, 1, 0)]
    monkeypatch.setattr(FlowModule, "global_rank", property(lambda self: 1))
    draws += [draw(module, 0, step) for step in range(3)]
    monkeypatch.undo()
    assert len(set(draws)) == 7
    assert draw(FlowModule(flow, example=x, seed=5), 0, 2) == draws[2]
    assert draw(FlowModule(flow, example=x, seed=6), 0, 2) != draws[2]


def test_frozen_parameters_stay_frozen(x):
    flow = SplineFlow(DIM, num_transforms=2, hidden_dims=[8])
    frozen = list(flow.layers[0].parameters())
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [parameter.clone() for parameter in flow.parameters()]
    module = FlowModule(flow, example=x, lr=1e-2)
    trainer(epochs=2).fit(module, RowLoader(x, 20))
    moved = [not torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True)]
    kept = {id(parameter) for parameter in frozen}
    assert [id(p) not in kept for p in flow.parameters()] == moved


def test_frozen_parameters_that_pyro_would_unfreeze_stay_frozen(x):
    guide = AutoNormal(mean_model)
    guide(x)
    guide.locs.mu_unconstrained.requires_grad_(False)
    pyro.clear_param_store()
    module = FlowModule(mean_model, guide, example=x, data_size=ROWS)
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    trainer(epochs=2).fit(module, RowLoader(x, 20))
    moved = [not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True)]
    assert moved == [False, True]


def test_parameters_of_plain_functions_are_trained_and_saved(x):
    module = normal_guide(x)
    before = pyro.param("noise.scale").item()
    assert any(name == "store.noise/scale" for name, _ in module.named_parameters())
    trainer(epochs=2).fit(module, RowLoader(x, 10))
    after = pyro.param("noise.scale").detach()
    assert abs(after.item() - before) > 0.01
    assert torch.equal(after, module.state_dict()["store.noise/scale"].exp())


def test_a_network_that_belongs_to_no_module_is_refused(x):
    network = nn.Linear(DIM, DIM)

    def model(x: torch.Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(network(x), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="pyro.module.'network', .* in a plain function"):
        FlowModule(model, example=x, data_size=ROWS)


def test_a_parameter_that_comes_late_is_refused(x):
    calls = []

    def model(x: torch.Tensor) -> None:
        calls.append(1)
        loc = pyro.param("loc", torch.zeros(DIM))
        if len(calls) > 3:
            loc = loc + pyro.param("late", torch.zeros(DIM))
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    module = FlowModule(model, example=x, data_size=ROWS)
    with pytest.raises(ValueError, match="come into being with the example, got .*late later"):
        trainer().fit(module, RowLoader(x, 10))


def test_a_parameter_that_no_optimizer_holds_is_found(x):
    module = normal_guide(x)
    pyro.get_param_store()["noise.scale"] = torch.tensor(1.0)  # sharding has the same effect
    with pytest.raises(ValueError, match="got others for noise.scale: they would not be trained"):
        trainer().fit(module, RowLoader(x, 10))


def test_wrong_plates_are_found(x):
    def model(x: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([DIM]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="Expected plate 'data' of the model .* 60 .*got 10"):
        FlowModule(model, AutoNormal(model), example=x[:10], data_size=ROWS)
    with pytest.raises(ValueError, match="Expected data_size"):
        FlowModule(model, AutoNormal(model), example=x[:10])
    FlowModule(model, AutoNormal(model), example=x[:10], check_plates=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guide": None}, ValueError, "Expected a guide for the latent sites"),
        ({"objective": TraceGraph_ELBO()}, TypeError, "Expected an objective with differentiable"),
        ({"objective": TraceMeanField_ELBO()}, ValueError, "Expected another objective"),
        ({"objective": "elbo"}, TypeError, "Expected objective to be an instance of"),
        ({"scheduler": "plateau"}, ValueError, "Expected scheduler to be one of constant"),
        ({"example": [1.0]}, TypeError, "Expected example to be a tensor or a tuple of tensors"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, error, message, x):
    guide = AutoSplineFlow(mean_model, num_transforms=1, hidden_dims=[8])
    with pytest.raises(error, match=message):
        FlowModule(mean_model, **{"guide": guide, "example": x, "data_size": ROWS, **options})


def test_no_trainable_parameter_is_refused(x):
    flow = SplineFlow(DIM)
    for parameter in flow.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="Expected at least one trainable parameter"):
        FlowModule(flow, example=x)


def test_maximum_likelihood_takes_no_objective(x):
    with pytest.raises(
        ValueError, match="Expected no objective, or objective='likelihood', and no num_particles"
    ):
        FlowModule(SplineFlow(DIM), example=x, objective=Trace_ELBO())


def test_schedules_run_over_the_steps_of_the_trainer(x):
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = FlowModule(SplineFlow(DIM), example=x, lr=0.5, scheduler="cosine")
    trainer(epochs=2, callbacks=[Rates()]).fit(module, RowLoader(x, 15))
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * s / 8)) for s in range(8)])


def test_a_schedule_without_an_end_is_refused(x):
    module = FlowModule(SplineFlow(DIM), example=x, scheduler="cosine")
    with pytest.raises(ValueError, match="Expected max_steps or max_epochs of the trainer"):
        trainer(epochs=-1).fit(module, RowLoader(x, 15))


def test_optimizer_and_schedule_of_the_caller_are_taken(x):
    module = FlowModule(
        mean_model,
        AutoDelta(mean_model),
        example=x,
        data_size=ROWS,
        lr=0.1,
        optimizer=torch.optim.SGD,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    running = trainer(epochs=2)
    running.fit(module, RowLoader(x, 20))
    assert isinstance(running.optimizers[0], torch.optim.SGD)
    assert running.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**6)


def test_arguments_follow_the_batch(x):
    def model(x: torch.Tensor, scale: torch.Tensor, *, shift: float) -> None:
        loc = pyro.param("loc", torch.zeros(DIM))
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(loc + shift, scale).to_event(1), obs=x)

    module = FlowModule(
        model, example=x, data_size=ROWS, args=(torch.tensor(2.0),), kwargs={"shift": 1.0}
    )
    (result,) = trainer().validate(module, RowLoader(x), verbose=False)
    expected = dist.Normal(1.0, 2.0).log_prob(x).sum(1).mean()
    assert result["validation"] == pytest.approx(float(expected), rel=1e-5)


def test_row_loader_gives_the_rows_in_the_order_of_fit(x):
    loader, batches = RowLoader(x, 25, seed=4), RowBatches((x,), 25, 4)
    assert len(loader) == 2
    for epoch in range(3):
        loader.set_epoch(epoch)
        given = [rows for (rows,) in loader]
        assert all(torch.equal(rows, batches[2 * epoch + i][0]) for i, rows in enumerate(given))
        assert len(given) == 2


def test_row_loader_goes_on_in_the_midst_of_an_epoch(x):
    loader, again = RowLoader(x, 10), RowLoader(x, 10)
    rows = iter(loader)
    next(rows), next(rows)
    again.load_state_dict(loader.state_dict())
    rest = list(rows)
    assert len(rest) == 4
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, again, strict=True))
    assert len(list(again)) == 6  # the epoch after is whole


@pytest.mark.parametrize("found", ["2.6.5", "2.6.5.post0", "1.9", "2.6.6rc1", "0+unknown", None])
def test_an_unsafe_lightning_is_refused(found):
    with pytest.raises(ImportError, match=r"Expected lightning >= 2\.6\.6, got"):
        _check_version(found)


@pytest.mark.parametrize("found", ["2.6.6", "2.6.10", "2.7.0rc1", "2.6.6+local", "3.0"])
def test_a_safe_lightning_is_accepted(found):
    _check_version(found)


def test_nothing_of_the_package_imports_the_adapter():
    importing = re.compile(r"^\s*(from|import) (pyro_flowkit\.)?lightning\b", re.MULTILINE)
    package = Path(pyro_flowkit.__file__).parent
    found = [file.name for file in package.rglob("*.py") if importing.search(file.read_text())]
    assert found == ["lightning.py"]
