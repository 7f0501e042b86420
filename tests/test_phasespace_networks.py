"""The score networks' fast paths against torch.func, to float64's precision."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, vmap

from galray.phasespace.activations import derivatives
from galray.phasespace.gradient_mlp import GradientMLP
from galray.phasespace.mlp import DivergenceMLP

ACTIVATIONS = ["tanh", "silu", "softplus"]
WIDTHS = [(12,), (12, 9), (12, 9, 7), (8, 9, 10, 7)]


def network(form, hidden, activation="silu"):
    torch.manual_seed(0)
    net = {"gradient": GradientMLP, "vector": DivergenceMLP}[form](6, hidden, activation).double()
    torch.nn.init.normal_(net.out.weight)
    return net, torch.randn(40, 6, dtype=torch.float64)


def score_at(net, parameters, u):
    """The score at one point, by torch.func in gradient form."""
    if isinstance(net, GradientMLP):

        def potential(p):
            a = p
            for i in range(len(net.hidden)):
                z = parameters[f"hidden.{i}.weight"] @ a + parameters[f"hidden.{i}.bias"]
                a = derivatives(net.activation, z, 0)[0]
            return parameters["out.weight"][0] @ a

        return grad(potential)(u)
    return functional_call(net, parameters, (u,))


def loss_by_torch_func(net, u):
    """Score, divergence, and the implicit score-matching loss as a function of the parameters."""

    def loss(parameters):
        score = vmap(lambda p: score_at(net, parameters, p))(u)
        jacobian = vmap(jacrev(lambda p: score_at(net, parameters, p)))(u)
        divergence = jacobian.diagonal(dim1=-1, dim2=-2).sum(-1)
        return (0.5 * score.square().sum(-1) + divergence).mean(), (score, divergence, jacobian)

    return loss


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_activations(name):
    z = torch.linspace(-6, 6, 61, dtype=torch.float64)
    found = derivatives(name, z, 3)

    def value(p):
        return derivatives(name, p, 0)[0]

    for order, ours in enumerate(found):
        assert torch.allclose(ours, vmap(value)(z), atol=1e-13), order
        assert torch.equal(derivatives(name, z, order)[-1], ours) or torch.allclose(
            derivatives(name, z, order)[-1], ours, atol=1e-15
        )
        value = grad(value)


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["gradient", "vector"])
def test_score_divergence_and_the_gradient_of_their_loss(form, hidden, activation):
    net, u = network(form, hidden, activation)
    parameters = dict(net.named_parameters())
    expected, (loss, (score, divergence, _)) = grad_and_value(net, u)
    ours, our_divergence = net.value_and_divergence(u)
    assert torch.allclose(ours, score, atol=1e-12)
    assert torch.allclose(our_divergence, divergence, atol=1e-11)
    assert torch.allclose(net(u.reshape(4, 10, 6)).reshape(-1, 6), score, atol=1e-12)
    our_loss = (0.5 * ours.square().sum(-1) + our_divergence).mean()
    assert float(our_loss.detach()) == pytest.approx(float(loss), rel=1e-12)
    gradients = torch.autograd.grad(our_loss, list(parameters.values()))
    for name, found in zip(parameters, gradients, strict=True):
        scale = float(expected[name].abs().max())
        assert torch.allclose(found, expected[name], rtol=1e-9, atol=1e-12 * max(scale, 1.0)), name


def grad_and_value(net, u):
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    return torch.func.grad_and_value(loss_by_torch_func(net, u), has_aux=True)(parameters)


@pytest.mark.parametrize("form", ["gradient", "vector"])
def test_the_loss_can_be_differentiated_twice_and_by_the_points(form):
    """A product with the Hessian of the loss, and the loss's gradient by the points themselves."""
    net, u = network(form, (7, 6, 5), "tanh")
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    torch.manual_seed(1)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}

    def value(parameters):
        return loss_by_torch_func(net, u)(parameters)[0]

    expected = torch.func.jvp(grad(value), (parameters,), (direction,))[1]
    points = u.clone().requires_grad_(True)
    score, divergence = net.value_and_divergence(points)
    loss = (0.5 * score.square().sum(-1) + divergence).mean()
    own = list(net.parameters())
    first = torch.autograd.grad(loss, own, create_graph=True)
    along = sum((g * direction[name]).sum() for g, name in zip(first, parameters, strict=True))
    for found, name in zip(torch.autograd.grad(along, own), parameters, strict=True):
        assert torch.allclose(found, expected[name], rtol=1e-8, atol=1e-10), name

    score, divergence = net.value_and_divergence(points)
    by_points = torch.autograd.grad((0.5 * score.square().sum(-1) + divergence).mean(), points)[0]

    def at(points):
        jacobian = vmap(jacrev(lambda p: score_at(net, parameters, p)))(points)
        score = vmap(lambda p: score_at(net, parameters, p))(points)
        return (0.5 * score.square().sum(-1) + jacobian.diagonal(dim1=-1, dim2=-2).sum(-1)).mean()

    assert torch.allclose(by_points, grad(at)(u), atol=1e-11)


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("form", ["gradient", "vector"])
def test_curvature_along_a_direction(form, hidden):
    net, u = network(form, hidden)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    _, (score, _, jacobian) = loss_by_torch_func(net, u)(parameters)
    direction = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, curvature = net.value_and_curvature(u, direction)
    assert torch.allclose(ours, score, atol=1e-12)
    expected = torch.einsum("ni,nij,nj->n", direction, jacobian, direction)
    assert torch.allclose(curvature, expected, atol=1e-11)


def test_gradient_form_has_no_curl_and_is_the_gradient_of_its_potential():
    net, u = network("gradient", (12, 9))
    assert torch.allclose(net(u), vmap(grad(net.potential))(u), atol=1e-12)
    bent = vmap(jacrev(net))(u)
    assert torch.allclose(bent, bent.mT, atol=1e-12)
    assert torch.allclose(bent, vmap(hessian(net.potential))(u), atol=1e-11)
