"""torch.func's transforms of the operator: the same numbers as autograd, or an error that says what to do."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from lightning_acu import ACUConv2d, acu_conv2d

BACKENDS = ["auto", "cython", "dense"]


@pytest.fixture
def arguments():
    """Two position groups and two groups of channels, on an image that is higher than wide."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"input": (3, 4, 7, 5), "weight": (6, 2, 3, 2), "offsets": (2, 6, 2), "bias": (6,)}
    return {name: torch.randn(s, generator=generator, dtype=torch.double) * 0.6 for name, s in shapes.items()}


def loss(tensors, backend="auto"):
    output = acu_conv2d(**tensors, stride=(2, 1), padding=1, groups=2, backend=backend)
    return (output.sin() * torch.arange(output.numel(), dtype=torch.double).reshape(output.shape)).sum()


def by_autograd(tensors):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    loss(leaves).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: grad(f)(x),
        lambda f, x: vjp(f, x)[1](torch.ones((), dtype=torch.double))[0],
        lambda f, x: jacrev(f)(x),
    ],
    ids=["grad", "vjp", "jacrev"],
)
def test_reverse_mode_equals_autograd(arguments, transform, backend):
    gradients = transform(lambda tensors: loss(tensors, backend), arguments)
    for name, expected in by_autograd(arguments).items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_each_image(arguments, backend):
    """vmap over grad: what per-sample clipping and influence functions ask for."""
    images = arguments.pop("input")

    def of_one(tensors, image):
        return acu_conv2d(image, **tensors, padding=1, groups=2, backend=backend).square().sum()

    each = vmap(grad(of_one), (None, 0))(arguments, images)
    for number, image in enumerate(images):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
        of_one(leaves, image).backward()
        for name, leaf in leaves.items():
            torch.testing.assert_close(each[name][number], leaf.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mapped", ["input", "weight", "offsets", "bias"])
def test_vmap_over_any_argument(arguments, mapped):
    many = dict(arguments) | {mapped: torch.stack([arguments[mapped], arguments[mapped] * 2], dim=1)}
    dims = {name: 1 if name == mapped else None for name in arguments}
    outputs = vmap(lambda tensors: acu_conv2d(**tensors, groups=2), (dims,))(many)
    for number, factor in enumerate((1, 2)):
        expected = acu_conv2d(**arguments | {mapped: arguments[mapped] * factor}, groups=2)
        torch.testing.assert_close(outputs[number], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mapped", ["input", "weight", "offsets", "bias"])
def test_vmap_over_no_entries(arguments, mapped):
    none = arguments | {mapped: arguments[mapped][None][:0]}
    dims = {name: 0 if name == mapped else None for name in arguments}
    expected = acu_conv2d(**arguments, groups=2)
    assert vmap(lambda tensors: acu_conv2d(**tensors, groups=2), (dims,))(none).shape == (0, *expected.shape)
    each = vmap(grad(loss), (dims,))(none)
    assert {name: each[name].shape for name in each} == {name: (0, *t.shape) for name, t in arguments.items()}


def test_gradients_of_each_of_no_images(arguments):
    images = arguments.pop("input")[:0]
    each = vmap(grad(lambda tensors, image: acu_conv2d(image, **tensors, groups=2).sum()), (None, 0))(arguments, images)
    assert each["weight"].shape == (0, *arguments["weight"].shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["input", "weight", "offsets", "bias"])
def test_the_jacobian_equals_autograds(arguments, backend, name):
    """Of all outputs, each by a backward pass of its own."""

    def function(tensor):
        output = acu_conv2d(**arguments | {name: tensor}, stride=(3, 2), padding=1, groups=2, backend=backend)
        return output[:1, ::2].sin()

    found, leaf = jacrev(function)(arguments[name]), arguments[name].clone().requires_grad_()
    output = function(leaf)
    rows = [torch.autograd.grad(number, leaf, retain_graph=True)[0] for number in output.flatten()]
    expected = torch.stack(rows).reshape(*output.shape, *leaf.shape)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # by torch, at the first jvp
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: vmap(f)(x),
        lambda f, x: grad(lambda y: f(y[0]).sum())(x)[0],
        lambda f, x: vmap(grad(lambda y: f(y).sum()))(x),
    ],
    ids=["vmap", "grad", "vmap(grad)"],
)
def test_transforms_within_a_level_of_forward_mode(arguments, transform, backend):
    image = arguments.pop("input")[None]

    def function(images):
        return acu_conv2d(images, **arguments, groups=2, backend=backend)

    expected = transform(function, image)
    with forward_ad.dual_level():
        torch.testing.assert_close(transform(function, image), expected, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match=r"no forward-mode.*use backend='reference'"):
            transform(function, forward_ad.make_dual(image, torch.ones_like(image)))


def test_an_ensemble_of_layers():
    """As torch.func.functional_call and vmap are used for ensembles."""
    layers = [ACUConv2d(3, 4, 3, padding=1).double() for _ in range(3)]
    stacked = {
        name: torch.stack([layer.get_parameter(name) for layer in layers]) for name in ("weight", "offsets", "bias")
    }
    stacked = {name: tensor.detach() + 0.3 for name, tensor in stacked.items()}
    image = torch.randn(2, 3, 6, 4, dtype=torch.double)
    outputs = vmap(lambda tensors: functional_call(layers[0], tensors, (image,)))(stacked)
    for number in range(3):
        one = {name: tensor[number] for name, tensor in stacked.items()}
        torch.testing.assert_close(outputs[number], functional_call(layers[0], one, (image,)), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # by torch, at the first jvp
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda f, x: grad(lambda y: grad(f)(y)["weight"].sum())(x), "no second derivative"),
        (lambda f, x: hessian(f)(x), "no forward-mode"),
        (lambda f, x: jacfwd(f)(x), "no forward-mode"),
        (lambda f, x: jvp(f, (x,), (x,)), "no forward-mode"),
    ],
    ids=["grad of grad", "hessian", "jacfwd", "jvp"],
)
def test_what_fast_backends_cannot_do_names_the_reference(arguments, transform, message, backend):
    with pytest.raises(RuntimeError, match=f"{message}.*use backend='reference'"):
        transform(lambda tensors: loss(tensors, backend), arguments)


def test_the_reference_has_all_of_them(arguments):
    torch.testing.assert_close(
        hessian(lambda o: loss(arguments | {"offsets": o}, "reference"))(arguments["offsets"]),
        jacrev(jacrev(lambda o: loss(arguments | {"offsets": o}, "reference")))(arguments["offsets"]),
    )
