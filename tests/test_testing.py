"""The conformance kit catches transforms that break the contract, one fault for each kind of check."""

import pytest
import torch

import pyro_flowkit.transforms as T
from pyro_flowkit import testing


class Wrong(T.Spline):
    """A correct spline, for the faulty ones below to change in one point."""


class LogDetByElement(Wrong):
    """Right for the vector, wrong for its elements."""

    def call_and_event_ladj(self, x):
        y, ladj = super().call_and_event_ladj(x)
        return y, ladj.flip(-1)


class LogDetSign(Wrong):
    def call_and_ladj(self, x):
        y, ladj = super().call_and_ladj(x)
        return y, -ladj


class InverseIsForward(Wrong):
    def inverse_and_ladj(self, y):
        x, ladj = super().call_and_ladj(y)
        return x, -ladj


class Shifted(Wrong):
    def call_and_ladj(self, x):
        y, ladj = super().call_and_ladj(x)
        return y + 1e-3, ladj

    def inverse_and_ladj(self, y):
        return super().inverse_and_ladj(y - 1e-3)


class Decreasing(Wrong):
    def call_and_ladj(self, x):
        y, ladj = super().call_and_ladj(x)
        return -y, ladj

    def inverse_and_ladj(self, y):
        return super().inverse_and_ladj(-y)


class NanAtInfinity(Wrong):
    def call_and_ladj(self, x):
        y, ladj = super().call_and_ladj(x)
        return y, ladj + 0.0 * x.sum(-1)


class OneDtype(Wrong):
    def call_and_ladj(self, x):
        y, ladj = super().call_and_ladj(x)
        return y.float(), ladj


class SummedBatch(Wrong):
    def call_and_ladj(self, x):
        y, ladj = super().call_and_ladj(x)
        return y, ladj.sum()


class BooleanMask(Wrong):
    def call_and_ladj(self, x):
        y, ladj = super().call_and_ladj(x)
        y = y.clone()
        y[x.abs() > 3.0] = x[x.abs() > 3.0]
        return y, ladj


class HoardsItsRows(Wrong):
    def call_and_ladj(self, x):
        self.last = x.detach()
        return super().call_and_ladj(x)


class HiddenState(Wrong):
    """An offset that no parameter or buffer holds."""

    def __init__(self, *args):
        super().__init__(*args)
        self.offset = [torch.randn(1, generator=torch.Generator().manual_seed(id(self) % 1000))]

    def __deepcopy__(self, memo):
        copied = HiddenState(self.input_dim)
        copied.load_state_dict(self.state_dict())
        copied.offset = [self.offset[0] + 1.0]
        return copied

    def call_and_ladj(self, x):
        y, ladj = super().call_and_ladj(x)
        return y + self.offset[0], ladj

    def inverse_and_ladj(self, y):
        return super().inverse_and_ladj(y - self.offset[0])


class TorchInverse(Wrong):
    """The inverse that torch would give: no module, no parameters."""

    @property
    def inv(self):
        return torch.distributions.Transform.inv.fget(self)


class NoSizeCheck(Wrong):
    def _check_input(self, x, context=None):
        pass

    def call_and_ladj(self, x):
        return super().call_and_ladj(x[..., : self.input_dim])

    def inverse_and_ladj(self, y):
        return super().inverse_and_ladj(y[..., : self.input_dim])


FAULTS = {
    LogDetByElement: ["log_det"],
    LogDetSign: ["log_det", "round_trip"],
    InverseIsForward: ["round_trip"],
    Shifted: ["identity_at_init", "edges"],
    Decreasing: ["monotone", "edges"],
    NanAtInfinity: ["infinite"],
    OneDtype: ["dtypes"],
    SummedBatch: ["shapes"],
    HoardsItsRows: ["pickle"],
    HiddenState: ["deepcopy", "state_dict", "param_store"],
    TorchInverse: ["inverse_module"],
    NoSizeCheck: ["input_errors"],
}


@pytest.mark.parametrize(
    ("fault", "check"), [(fault, check) for fault, checks in FAULTS.items() for check in checks]
)
def test_a_fault_is_caught(fault, check):
    testing.check_transform(lambda: Wrong(2), only=[check], bound=3.0)
    with pytest.raises(AssertionError):
        testing.check_transform(lambda: fault(2), only=[check], bound=3.0)


def test_boolean_masks_are_caught_under_vmap():
    with pytest.raises(RuntimeError):
        testing.check_transform(lambda: BooleanMask(2), only=["function_transforms"])


def test_a_second_run_of_the_conditioner_is_caught():
    class Forgetful(T.SplineCoupling):
        @property
        def inv(self):
            return torch.distributions.Transform.inv.fget(self)

        def _inverse(self, y):
            return self.inverse_and_ladj(y)[0]

    def forgetful():
        transform = T.spline_coupling(2)
        transform.__class__ = Forgetful
        return transform

    with pytest.raises(AssertionError, match="run once"):
        testing.check_transform(forgetful, only=["conditioner_runs_once"])


def test_a_slope_below_one_at_the_bound_is_caught():
    class Kinked(Wrong):
        def call_and_ladj(self, x):
            y, ladj = super().call_and_ladj(x)
            inside = (x.abs() <= 3.0).all(-1)
            return y, torch.where(inside, ladj - 1e-3, ladj)

    with pytest.raises(AssertionError, match="log-det across"):
        testing.check_transform(lambda: Kinked(2), only=["slope_at_bounds"], bound=3.0)


def test_any_transform_module_of_pyro_can_be_checked():
    from pyro.distributions.transforms import AffineCoupling, Spline
    from pyro.nn import DenseNN

    def elementwise():
        return Spline(2, order="quadratic").double()

    def affine_coupling():
        transform = AffineCoupling(1, DenseNN(1, [8], [1, 1]))
        transform.input_dim = 2
        return transform

    testing.check_transform(affine_coupling, only=["round_trip", "log_det"])
    testing.check_transform(elementwise, only=["round_trip", "log_det"])


def test_unknown_checks_and_options_are_refused():
    with pytest.raises(ValueError, match="got .'roundtrip'"):
        testing.check_transform(lambda: T.spline(2), only=["roundtrip"])
    with pytest.raises(ValueError, match="got .'bounds'"):
        testing.check_transform(lambda: T.spline(2), bounds=3.0)


def test_every_public_check_is_in_the_mapping():
    public = {name for name in dir(testing) if name.startswith("check_")} - {"check_transform"}
    assert public == {f"check_{name}" for name in testing.CHECKS}
    assert public <= set(testing.__all__)
    assert testing.SPLINE_CHECKS < set(testing.CHECKS)


def test_checking_leaves_the_parameters_and_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    transform = testing.perturb_(T.spline_coupling(2))
    torch.random.set_rng_state(before)
    saved = {name: value.clone() for name, value in transform.state_dict().items()}
    testing.check_transform(lambda: T.spline(2), only=["round_trip", "distribution"])
    assert torch.equal(torch.random.get_rng_state(), before)
    testing.check_distribution(transform)
    for name, value in transform.state_dict().items():
        assert torch.equal(value, saved[name]), name
