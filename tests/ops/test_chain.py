"""Layers that run in one call of the kernel: the numbers of the same layers one by one in PyTorch."""

import pytest
import torch

from pyro_flowkit import SplineFlow
from pyro_flowkit.ops import chain, use_reference
from pyro_flowkit.testing import perturb_
from pyro_flowkit.transforms import spline_coupling
from pyro_flowkit.transforms.affine import Affine
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine
from tests.ops.kernel_cases import assert_same, generator

BLOCKS = {2: [1, 1], 5: [2, 3], 11: [1, 6, 4]}
TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3}


def make(dim, *, kind="full", mixing="lu", dtype=torch.float64, hierarchical=True, linear=True):
    """The layers of a guide, none of them near the identity."""
    torch.manual_seed(0)
    flow = SplineFlow(dim, num_transforms=4, hidden_dims=[9, 6], bound=4.0, mixing=mixing)
    layers = [*perturb_(flow, 0.1).layers]
    if hierarchical:
        hierarchy = perturb_(HierarchicalAffine(BLOCKS[dim], hidden_dims=(7,)), 0.3)
        if not linear:
            for conditioner in hierarchy.conditioners:
                conditioner.weight = None
        layers.append(hierarchy)
    affine = Affine(torch.randn(dim), 0.5, kind)
    noise = torch.randn(dim, dim)
    affine.restart(torch.randn(dim), torch.linalg.cholesky(noise @ noise.mT + torch.eye(dim)))
    return [layer.to(dtype) for layer in [*layers, perturb_(affine, 0.02)]]


def links_of(layers):
    return [layer.link() for layer in layers]


def numbers(*shape, seed, dtype):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def by_chain(layers, z, cut):
    """Value, log-det, derivatives carried along, and the derivatives of everything that is learned."""
    links = links_of(layers)
    assert chain.applies(z, links)
    value, ladj, passage = chain.run(z, links)
    weights = [numbers(*t.shape, seed=i, dtype=z.dtype) for i, t in enumerate((z, z[:, 0]))]
    grads, squares = passage.backward(*weights)
    assert squares is None
    tensors = [z, *(tensor for link in links for tensor in link.tensors)]
    learned = [
        grad
        for grad, t in zip(grads, tensors, strict=True)
        if isinstance(t, torch.nn.Parameter) or t is z
    ]
    return [value, ladj, *passage.pushed(-z, cut), *learned]


def by_layers(layers, z, cut):
    """The same by autograd, without the kernel."""
    with use_reference():
        x, ladj, inputs = z.clone().requires_grad_(), 0.0, []
        leaf = x
        for layer in layers:
            inputs.append(x)
            x, own = layer.call_and_ladj(x)
            ladj = ladj + own
        derivatives = [-z]
        for layer, before, after in zip(layers, inputs, [*inputs[1:], x], strict=True):
            derivatives.append(layer.pushed_derivative(before, after, derivatives[-1]))
        weights = [numbers(*t.shape, seed=i, dtype=z.dtype) for i, t in enumerate((z, z[:, 0]))]
        tensors = [t for link in links_of(layers) for t in link.tensors]
        leaves = [leaf, *(t for t in tensors if isinstance(t, torch.nn.Parameter))]
        grads = torch.autograd.grad((x * weights[0]).sum() + (ladj * weights[1]).sum(), leaves)
    pushed = (derivatives[cut], derivatives[len(layers) - 1], derivatives[-1])
    return [x.detach(), ladj.detach(), *(d.detach() for d in pushed), *grads]


@pytest.mark.parametrize("dim", BLOCKS)
@pytest.mark.parametrize("rows", [0, 1, 64, 101])
def test_a_chain_equals_its_layers(instruction_set, rows, dim):
    layers = make(dim)
    z = 3.0 * numbers(rows, dim, seed=5, dtype=torch.float64)  # some of it is beyond all bounds
    cut = 3 if rows % 2 else len(layers)
    assert_same(by_chain(layers, z, cut), by_layers(layers, z, cut), tolerance=1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "diagonal"},
        {"mixing": "permute"},
        {"hierarchical": False},
        {"linear": False},
    ],
    ids=str,
)
def test_every_kind_of_layer_equals_itself(instruction_set, settings):
    layers = make(5, **settings)
    z = numbers(13, 5, seed=5, dtype=torch.float64)
    assert_same(by_chain(layers, z, 1), by_layers(layers, z, 1), tolerance=1e-8)


def test_float32_is_as_good_as_the_layers_are(instruction_set):
    layers, narrow = make(11), make(11, dtype=torch.float32)
    z = numbers(64, 11, seed=5, dtype=torch.float32)
    exact = by_layers(layers, z.double(), 2)
    scales = [float(t.abs().max()) + 1e-3 for t in exact]

    def errors(found):
        return [
            float((one - other).abs().max()) / scale
            for one, other, scale in zip(found, exact, scales, strict=True)
        ]

    for own, reference in zip(
        errors(by_chain(narrow, z, 2)), errors(by_layers(narrow, z, 2)), strict=True
    ):
        assert own <= 4 * reference + 1e-5


@pytest.mark.parametrize("is_path", [True, False])
def test_noise_is_measured_before_the_last_layer(instruction_set, is_path):
    layers = make(5)
    affine = layers[-1]
    z = numbers(20, 5, seed=5, dtype=torch.float64)
    *_, passage = chain.run(z, links_of(layers))
    _, of_q, derivative = passage.pushed(-z, 0)
    arrived, weight = (numbers(20, *shape, seed=1, dtype=torch.float64) for shape in ([5], []))
    _, squares = passage.backward(arrived, None, chain.Noise(weight, of_q, is_path))
    found = -arrived / weight[:, None]
    each = (found, found + derivative) if is_path else (found - derivative, found)
    assert_same([squares], [affine.in_units(torch.stack(each)).square().flatten(1).mean(-1)])


def back_by_chain(layers, y):
    """Input, log-det of the way back, and the derivatives of everything that is learned."""
    links = links_of(layers)
    x, ladj, way = chain.pull(y, links)
    weights = [numbers(*t.shape, seed=i, dtype=y.dtype) for i, t in enumerate((y, y[:, 0]))]
    grad_y, grads = way.backward(*weights)
    tensors = [tensor for link in links for tensor in link.tensors]
    pairs = zip(grads, tensors, strict=True)
    return [x, ladj, grad_y, *(grad for grad, t in pairs if isinstance(t, torch.nn.Parameter))]


def back_by_layers(layers, y):
    """The same by autograd, without the kernel."""
    with use_reference():
        leaf = y.clone().requires_grad_()
        x, ladj = leaf, 0.0
        for layer in reversed(layers):
            x, own = layer.inverse_and_ladj(x)
            ladj = ladj + own
        weights = [numbers(*t.shape, seed=i, dtype=y.dtype) for i, t in enumerate((y, y[:, 0]))]
        tensors = [t for link in links_of(layers) for t in link.tensors]
        leaves = [leaf, *(t for t in tensors if isinstance(t, torch.nn.Parameter))]
        grads = torch.autograd.grad((x * weights[0]).sum() + (ladj * weights[1]).sum(), leaves)
    return [x.detach(), ladj.detach(), *grads]


@pytest.mark.parametrize("dim", BLOCKS)
@pytest.mark.parametrize("rows", [0, 1, 64, 101])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_the_way_back_equals_that_of_the_layers(instruction_set, kind, rows, dim):
    layers = make(dim, kind=kind, hierarchical=False)
    y = 3.0 * numbers(rows, dim, seed=5, dtype=torch.float64)
    assert_same(back_by_chain(layers, y), back_by_layers(layers, y), tolerance=1e-8)


def test_the_way_back_leaves_what_passes_as_it_is(instruction_set):
    torch.manual_seed(0)
    layers = [
        perturb_(
            spline_coupling(5, hidden_dims=[7], bound=4.0, split_dim=split, identity=True), 0.3
        )
        for split in (2, 3)
    ]
    layers = [layer.double() for layer in layers]
    y = 3.0 * numbers(30, 5, seed=5, dtype=torch.float64)
    assert_same(back_by_chain(layers, y), back_by_layers(layers, y), tolerance=1e-8)


def test_in_float32_the_way_back_is_as_good_as_the_layers_are(instruction_set):
    layers = make(11, hierarchical=False)
    narrow = make(11, hierarchical=False, dtype=torch.float32)
    y = numbers(64, 11, seed=5, dtype=torch.float32)
    exact = back_by_layers(layers, y.double())
    scales = [float(t.abs().max()) + 1e-3 for t in exact]

    def errors(found):
        return [
            float((one - other).abs().max()) / scale
            for one, other, scale in zip(found, exact, scales, strict=True)
        ]

    own, reference = errors(back_by_chain(narrow, y)), errors(back_by_layers(narrow, y))
    for one, other in zip(own, reference, strict=True):
        assert one <= 4 * other + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("half", [-400.0, 360.0])
def test_a_likelihood_without_end_is_none_or_all_there_is(half, dtype, fused_kernel):
    layer = perturb_(HierarchicalAffine([1, 3]), 0.3).to(dtype)
    layer.conditioners[0].likelihood.data[1] = half
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    value, ladj, way = chain.run(x, [layer.link()])
    grads, _ = way.backward(torch.ones_like(x), torch.ones(5, dtype=dtype))
    assert all(t.isfinite().all() for t in (value, ladj, *grads))
    expected, expected_ladj = layer.call_and_ladj(x)
    assert torch.allclose(value, expected, atol=1e-4) and torch.allclose(
        ladj, expected_ladj, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_precision_of_a_fresh_likelihood_has_no_gradient(dtype, fused_kernel):
    """Not that of rounding either, which Adam would make a whole step of."""
    layer = HierarchicalAffine([2, 3]).to(dtype)
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, _, way = chain.run(x, [layer.link()])
    (_, _, _, of_likelihood), _ = way.backward(x, torch.ones(50, dtype=dtype))
    assert of_likelihood[0].abs().min() > 0
    assert (of_likelihood[1] == 0).all()


def test_a_hierarchy_has_no_way_back_here(fused_kernel):
    links = links_of(make(5))
    assert [link.goes_back for link in links].count(False) == 1
    with pytest.raises(ValueError, match="Expected for the way back a kind of layer below"):
        chain.pull(numbers(4, 5, seed=5, dtype=torch.float64), links)


def test_what_a_chain_is_not_for(fused_kernel):
    layers = make(5)
    z = numbers(4, 5, seed=5, dtype=torch.float64)
    links = links_of(layers)
    assert not chain.applies(z.float(), links), "another dtype"
    assert not chain.applies(torch.zeros(2**15, 5, dtype=torch.float64), links) or (
        torch.get_num_threads() == 1
    ), "many rows are shared out among threads"
    assert not chain.applies(torch.zeros(4, chain.MAX_DIM + 1, dtype=torch.float64), links)
    with use_reference():
        assert not chain.applies(z, links)

    class Mine(type(layers[-1])):
        pass

    layers[-1].__class__ = Mine
    assert layers[-1].link() is None, "a subclass may compute something else"
    assert Affine(torch.zeros(5), 1.0, "low_rank").link() is None
    circular = SplineFlow(5, mixing=None, tails="circular").layers[0]
    assert circular.link() is None
    assert SplineFlow(5, activation=torch.nn.Tanh).layers[0].link() is None


def test_permutations_follow_their_buffer(fused_kernel):
    layer = next(part for part in make(11) if type(part).__name__ == "Permute")
    order = torch.arange(11).roll(1)
    layer.link()
    layer.permutation.copy_(order)
    z = numbers(3, 11, seed=0, dtype=torch.float64)
    assert torch.equal(chain.run(z, [layer.link()])[0], z[:, order])


def changed(links, number, **fields):
    return [link._replace(**fields) if i == number else link for i, link in enumerate(links)]


def test_the_kernel_refuses_memory_of_another_size(fused_kernel):
    links = links_of(make(5))
    z = numbers(4, 5, seed=5, dtype=torch.float64)
    kinds = [link.description[0] for link in links]
    for number, link in enumerate(links):
        for i, tensor in enumerate(link.tensors):
            tensors = [*link.tensors]
            tensors[i] = tensor.new_zeros(tensor.numel() + 1)
            with pytest.raises(ValueError, match="Expected numbers in a tensor"):
                chain.run(z, changed(links, number, tensors=tuple(tensors)))
    coupling = kinds.index(0)
    description = links[coupling].description
    for i, wrong in ((1, 6), (11, 4), (12, 1), (14, (3, 9, 6, 1)), (2, b"\x07\0\0\0")):
        other = (*description[:i], wrong, *description[i + 1 :])
        with pytest.raises(ValueError, match="Expected"):
            chain.run(z, changed(links, coupling, description=other))
    order = kinds.index(2) if 2 in kinds else None
    for number, wrong in ((order, (2, b"\xff" * 20)), (kinds.index(1), (9,)), (coupling, (0,))):
        if number is not None:
            with pytest.raises(ValueError, match="Expected"):
                chain.run(z, changed(links, number, description=wrong))
    *_, passage = chain.run(z, links)
    with pytest.raises(ValueError, match="Expected a layer from 0 to"):
        passage.pushed(z, len(links) + 1)
    passage._kept = passage._kept[:, :-1]
    with pytest.raises(ValueError, match="Expected room to keep"):
        passage.pushed(z, 0)
    *_, way = chain.pull(z, links_of(make(5, hierarchical=False)))
    way._kept = way._kept[:, :-1]
    with pytest.raises(ValueError, match="Expected room to keep"):
        way.backward(z, None)
