"""Charts: exact inverses, exact Jacobians, scores that pull back as autograd says."""

from __future__ import annotations

import math

import pytest
import torch

from galray.errors import GalrayError
from galray.frame import cylindrical
from galray.phasespace import Ball, Chart

SUN = (-8.121973, 0.0, 0.0208)


def stars(n: int = 400, center=SUN, radius: float = 4.0) -> tuple[Ball, torch.Tensor]:
    ball = Ball(center, radius)
    generator = torch.Generator().manual_seed(3)
    x = ball.sample_uniform(n, generator)
    v = torch.randn(n, 3, generator=generator, dtype=torch.float64) * 40.0 + torch.tensor([5.0, 220.0, 0.0])
    return ball, torch.cat([x, v], -1)


@pytest.mark.parametrize("coordinates", ["cartesian", "cylindrical"])
@pytest.mark.parametrize("center", [SUN, (3.0, 7.0, 0.1), (9.0, 0.0, 0.0)])
def test_chart_inverse_jacobian_and_score(coordinates, center):
    ball, w = stars(50, center)
    chart = Chart(ball, coordinates)
    chart.fit(w)
    u = chart(w)
    assert torch.allclose(chart.inverse(u), w, atol=1e-9)
    assert torch.allclose(chart.position(w[:, :3]), u[:, :3])
    jacobian = torch.func.vmap(torch.func.jacrev(chart))(w)
    assert torch.allclose(chart.log_det(w), torch.linalg.slogdet(jacobian)[1], atol=1e-9)

    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def log_density(p):
        q = chart(p)
        return torch.sin(q @ matrix).sum(-1) + chart.log_det(p)

    p = w.clone().requires_grad_(True)
    expected = torch.autograd.grad(log_density(p).sum(), p)[0]
    q = u.clone().requires_grad_(True)
    inner = torch.autograd.grad(torch.sin(q @ matrix).sum(), q)[0]
    assert torch.allclose(chart.pull_score(w, inner), expected, atol=1e-9)


def test_cylindrical_chart_is_the_frame_s_own_at_the_sun():
    ball, w = stars(20)
    assert torch.allclose(Chart(ball, "cylindrical")(w), cylindrical(w), atol=1e-12)


@pytest.mark.parametrize("coordinates", ["cartesian", "cylindrical"])
def test_edge_weight_gradient_and_border(coordinates):
    ball, w = stars(50)
    chart = Chart(ball, coordinates)
    chart.fit(w)
    h, gradient = chart.edge_weight(w)
    q = chart(w).requires_grad_(True)
    expected = torch.autograd.grad(ball.edge_weight(chart.inverse(q)[:, :3])[0].sum(), q)[0]
    assert torch.allclose(gradient, expected[:, :3], atol=1e-9)
    assert float(h.min()) > 0
    border = torch.tensor([[SUN[0] + 4.0, 0.0, SUN[2]]], dtype=torch.float64)
    assert abs(float(ball.edge_weight(border)[0])) < 1e-12


def test_ball_map_inverse_and_jacobian():
    ball, w = stars(200)
    x = torch.cat([w[:, :3], torch.tensor([SUN], dtype=torch.float64)])  # the centre is a removable 0/0
    y = ball.to_unbounded(x)
    assert torch.allclose(ball.from_unbounded(y), x, atol=1e-9)
    jacobian = torch.func.vmap(torch.func.jacrev(ball.to_unbounded))(x)
    assert torch.allclose(ball.log_det(x), torch.linalg.slogdet(jacobian)[1], atol=1e-6)
    assert float(y.norm(dim=-1).max()) > 1.5  # the border goes to infinity


def test_a_star_on_the_border_survives_rounding_to_float32():
    ball = Ball(SUN, 0.05)  # small and far from the origin: float32 moves the border by 1e-5 of the radius
    direction = torch.randn(2000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.tensor(SUN, dtype=torch.float64) + 0.05 * direction / direction.norm(dim=-1, keepdim=True)
    rounded = x.float().double()
    assert ((rounded - torch.tensor(SUN)).norm(dim=-1) > 0.05).any()
    assert ball.contains(rounded).all()
    assert torch.isfinite(ball.to_unbounded(rounded)).all()
    assert torch.isfinite(ball.log_det(rounded)).all()
    assert not ball.contains(x + 0.001 * direction / direction.norm(dim=-1, keepdim=True)).any()


def test_standardisation_keeps_float64_when_networks_are_cast():
    ball, w = stars()
    chart = Chart(ball)
    chart.fit(w)
    chart.float()
    assert chart.scale.dtype == torch.float64


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ball(SUN, -1.0),
        lambda: Ball((math.nan, 0.0, 0.0), 1.0),
        lambda: Chart(Ball((1.0, 0.0, 0.0), 2.0), "cylindrical"),
    ],
)
def test_bad_balls_are_refused(make):
    with pytest.raises(GalrayError, match=r"ball|axis"):
        make()
