"""Least squares over velocities: exact on exact scores, unbiased on noisy ones."""

import pytest
import torch

from galray.errors import GalrayError
from galray.gravity import LeastSquaresField, Region, least_squares
from galray.mocks.spheres import HernquistSphere, IsochroneSphere, PlummerSphere
from galray.phasespace import ExactModel

SPHERES = {
    "plummer": PlummerSphere(1e9, 1.0),
    "isochrone": IsochroneSphere(1e11, 3.0),
    "hernquist": HernquistSphere(1e10, 2.0),
}


def positions(scale, n=40):
    generator = torch.Generator().manual_seed(11)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64) * scale


def relative(found, truth):
    return (found - truth).norm(dim=-1) / truth.norm(dim=-1)


@pytest.mark.parametrize("name", SPHERES)
@pytest.mark.parametrize("form", ["plain", "instrument"])
def test_exact_scores_give_exact_accelerations(name, form):
    sphere = SPHERES[name]
    x = positions(sphere.scale)
    found = least_squares(ExactModel(sphere), x, num_velocities=64, form=form, generator=5)
    assert float(relative(found, sphere.potential_field.acceleration(x)).max()) < 1e-6


@pytest.mark.parametrize("name", SPHERES)
def test_stein_form_converges(name):
    sphere = SPHERES[name]
    x = positions(sphere.scale, 30)
    found = least_squares(ExactModel(sphere), x, num_velocities=20_000, form="stein", generator=5)
    truth = sphere.potential_field.acceleration(x)
    error = relative(found, truth)
    assert float(error.square().mean().sqrt()) < 0.05
    bias = ((found - truth) * truth).sum() / truth.square().sum()
    assert abs(float(bias)) < 0.015


class NoisyScore:
    """The truth plus a smooth random function of w, as a network's score is."""

    def __init__(self, sphere, amplitude, seed):
        generator = torch.Generator().manual_seed(seed)
        self.model = ExactModel(sphere)
        self.speed = 30.0
        self.frequency = torch.randn(6, 200, generator=generator, dtype=torch.float64) * 1.5
        self.phase = torch.rand(200, generator=generator, dtype=torch.float64) * 2 * torch.pi
        self.mix = torch.randn(200, 6, generator=generator, dtype=torch.float64) * amplitude / 100**0.5

    def score(self, w):
        u = torch.cat([w[..., :3], w[..., 3:] / self.speed], -1)
        noise = torch.cos(u @ self.frequency + self.phase) @ self.mix
        return self.model.score(w) + torch.cat([noise[..., :3], noise[..., 3:] / self.speed], -1)

    def sample_velocity(self, x, n, generator):
        return self.model.sample_velocity(x, n, generator)


def test_noise_biases_the_plain_form_and_neither_the_instrument_nor_the_cross_fit():
    sphere = PlummerSphere(1e9, 1.0)
    x = positions(0.8, 60)
    truth = sphere.potential_field.acceleration(x)
    velocities = sphere.sample_velocity(x, 200, 3)

    def bias(form, partner):
        found = []
        for seed in range(24):
            other = NoisyScore(sphere, 0.4, 100 + seed) if partner else None
            a = least_squares(
                NoisyScore(sphere, 0.4, seed), x, velocities=velocities, form=form, partner=other
            )
            found.append(((a - truth) * truth).sum() / truth.square().sum())
        found = torch.stack(found)
        return float(found.mean()), float(found.std() / len(found) ** 0.5)

    plain, plain_error = bias("plain", False)
    assert plain < -0.03
    assert plain < -4 * plain_error
    for form, partner in (("instrument", False), ("plain", True)):
        value, error = bias(form, partner)
        assert abs(value) < 3 * error
        assert value - plain > 3 * error


def test_the_combination_has_less_noise_than_either_and_no_bias():
    sphere = PlummerSphere(1e9, 1.0)
    x = positions(0.8, 60)
    truth = sphere.potential_field.acceleration(x)
    velocities = sphere.sample_velocity(x, 200, 3)

    def errors(form):
        found = []
        for seed in range(12):
            model, other = NoisyScore(sphere, 0.4, seed), NoisyScore(sphere, 0.4, 100 + seed)
            if form == "combined":
                a = least_squares(model, x, velocities=velocities, form=form, partner=other)
            else:
                a = (
                    least_squares(model, x, velocities=velocities, form=form)
                    + least_squares(other, x, velocities=velocities, form=form)
                ) / 2
            found.append(a - truth)
        found = torch.stack(found)
        bias = (found * truth).sum((1, 2)) / truth.square().sum()
        return float(found.square().mean().sqrt()), float(bias.mean()), float(bias.std() / 12**0.5)

    combined, bias, error = errors("combined")
    assert combined < 0.97 * errors("instrument")[0]
    assert abs(bias) < 3 * error
    exact = least_squares(
        ExactModel(sphere), x, velocities=velocities, form="combined", partner=ExactModel(sphere)
    )
    assert float(relative(exact, truth).max()) < 1e-6


def test_wild_scores_are_set_aside():
    sphere = PlummerSphere(1e9, 1.0)

    class Wild(NoisyScore):
        def score(self, w):
            s = super().score(w)
            fast = w[..., 3] > torch.quantile(w[..., 3].flatten(), 0.99)
            return torch.where(fast[..., None], 30.0 * s.flip(-1), s)

    x = positions(1.0)
    truth = sphere.potential_field.acceleration(x)
    velocities = sphere.sample_velocity(x, 200, 3)
    model = Wild(sphere, 0.05, 1)
    for form in ("plain", "instrument"):
        raw = least_squares(model, x, velocities=velocities, form=form)
        clipped = least_squares(model, x, velocities=velocities, form=form, clip=8.0)
        assert float(relative(clipped, truth).median()) < 0.1 * float(relative(raw, truth).median())


def test_a_score_that_is_too_small_leaves_the_instrument_exact():
    sphere = PlummerSphere(1e9, 1.0)

    class Shrunk(NoisyScore):
        def score(self, w):
            return 0.8 * self.model.score(w)

    x = positions(1.0)
    found = least_squares(Shrunk(sphere, 0.0, 0), x, num_velocities=64, generator=1)
    assert float(relative(found, sphere.potential_field.acceleration(x)).max()) < 1e-9


def test_field_is_reproducible_and_batched():
    sphere = PlummerSphere(1e9, 1.0)
    model = NoisyScore(sphere, 0.3, 1)
    x = positions(1.0, 12)
    region = Region((0, 0, 0), 4.0)
    field = LeastSquaresField(model, region, num_velocities=50, seed=3, batch_size=200)
    torch.testing.assert_close(field.acceleration(x), field.acceleration(x), rtol=0, atol=0)
    velocities = sphere.sample_velocity(x.reshape(3, 4, 3), 30, 2)
    whole = least_squares(model, x.reshape(3, 4, 3), velocities=velocities)
    parts = least_squares(model, x.reshape(3, 4, 3), velocities=velocities, batch_size=31)
    assert whole.shape == (3, 4, 3)
    torch.testing.assert_close(whole, parts)


def test_bad_input():
    sphere = PlummerSphere(1e9, 1.0)
    model = ExactModel(sphere)
    x = positions(1.0, 4)
    with pytest.raises(GalrayError, match="per position"):
        least_squares(model, x, velocities=torch.zeros(10, 3, 3))
    with pytest.raises(GalrayError, match="at least 8"):
        least_squares(model, x, num_velocities=3, generator=1)
    with pytest.raises(GalrayError, match="partner"):
        least_squares(model, x, partner=model, generator=1)
    with pytest.raises(GalrayError, match="without a partner"):
        least_squares(model, x, form="combined", generator=1)

    class ScoreOnly:
        score = staticmethod(model.score)

    with pytest.raises(GalrayError, match="cannot draw velocities"):
        least_squares(ScoreOnly(), x)
