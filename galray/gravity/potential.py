"""a = −∇Φ fitted to the score at the stars: Φ a spline or Gaussian masses, and a network on top of either.

Every star gives one residual r(a) = v·sₓ + a(x)·sᵥ of the Boltzmann equation, and every form of
`galray.gravity.equations` solves E[z r | x] = 0 with a z of its own. A linear system gives the spline, a
non-negative one the masses; the network ψ then learns what they miss by following the pseudo-gradient of
−⟨stopgrad(z r), a(x)⟩, whose expectation is E[z sᵥᵀ](a − a_true). Nothing is assumed about symmetry; a
potential has no curl.

Which form is better depends on the score: its noise biases ``plain`` towards a = 0. On flows and score
networks trained on 365,000 stars of a disc mock that bias was about 1 % and the rms error of ``plain``
a third lower; on few stars with a poor score the instrument wins.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.gravity.equations import Equations, Form, estimating_equations
from galray.gravity.exports import Exportable
from galray.gravity.masses import MassField, fit_masses, mass_sets
from galray.gravity.region import Region, as_positions, as_region
from galray.gravity.roundness import ROUNDNESSES
from galray.gravity.settings import PotentialSettings
from galray.gravity.spline_field import SplineField
from galray.gravity.spline_fit import fit_spline_to_residuals, spline_basis
from galray.gravity.splines import Array, to_numpy
from galray.units import G

if TYPE_CHECKING:
    from galray.gravity.store import MeanField

__all__ = [
    "PotentialField",
    "PotentialNetwork",
    "choose_roundness",
    "fit_potential",
    "negative_mass",
    "scores_at",
    "taper",
]


_FIRST_GAIN = 4.0  # on the first layer: Φ has to bend within a small part of the ball


class PotentialNetwork(nn.Module):
    """ψ(x): a multilayer perceptron of smooth coordinates in a ball.

    The inputs are the Cartesian coordinates in units of the ball's radius, plain and stretched about its
    centre, and, for a ball away from the axis, cylindrical ones and a stretched height too: they make a disc
    easy to learn and exclude nothing.

    Arguments:
        region: The ball.
        hidden: Widths of the hidden layers.
        scale: Unit of the output, (km/s)².
    """

    def __init__(self, region: Region, hidden: tuple[int, ...], scale: float) -> None:
        super().__init__()
        self.region = region
        self.scale = scale
        self.off_axis = math.hypot(region.center[0], region.center[1]) > region.radius
        sizes = [10 if self.off_axis else 6, *hidden, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        with torch.no_grad():
            first.weight.mul_(_FIRST_GAIN)

    def features(self, x: Tensor) -> Tensor:
        """The inputs (n, F) at positions x (n, 3)."""
        center, radius = x.new_tensor(self.region.center), self.region.radius
        centred = (x - center) / radius
        parts = [centred, torch.asinh(6 * centred)]
        if self.off_axis:
            axis = math.hypot(self.region.center[0], self.region.center[1])
            # rotated so that the cut of the azimuth lies opposite the ball
            along = (x[:, 0] * center[0] + x[:, 1] * center[1]) / axis
            across = (x[:, 0] * center[1] - x[:, 1] * center[0]) / axis
            parts.append(
                torch.stack(
                    [
                        (torch.hypot(x[:, 0], x[:, 1]) - axis) / radius,
                        torch.atan2(across, along) * axis / radius,
                        torch.asinh(10 * x[:, 2] / radius) / 3,
                        torch.sqrt((10 * x[:, 2] / radius).square() + 1).log() / 3,
                    ],
                    1,
                )
            )
        return torch.cat(parts, 1)

    def forward(self, x: Tensor) -> Tensor:
        """ψ in (km/s)² at positions x (n, 3), shape (n,)."""
        h = self.features(x)
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        return self.layers[-1](h)[:, 0] * self.scale

    def gradient(self, features: Tensor, jacobian: Tensor) -> Tensor:
        """∇ψ (n, 3) from the inputs (n, F) and their Jacobian (n, 3, F), by pushing tangents forward."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        return (self.hidden_gradient(features, jacobian) @ last.weight.T)[..., 0] * self.scale

    def hidden_gradient(self, features: Tensor, jacobian: Tensor) -> Tensor:
        """Gradients (n, 3, H) of the last hidden layer's H outputs, arguments as in `gradient`."""
        h, t = features, jacobian
        for layer in self.layers[:-1]:
            assert isinstance(layer, nn.Linear)
            y = layer(h)
            gate = torch.sigmoid(y)
            h = y * gate
            t = (gate * (1 + y * (1 - gate)))[:, None] * (t @ layer.weight.T)
        return t

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs and their Jacobian at positions x (n, 3), for `gradient`."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            f = self.features(x)
            columns = [torch.autograd.grad(f[:, k].sum(), x, retain_graph=True)[0] for k in range(f.shape[1])]
        return f.detach(), torch.stack(columns, -1)


class PotentialField(Exportable):
    """Φ = base + ψ inside a ball.

    Arguments:
        base: The part that was solved for: a spline or Gaussian masses.
        network: ψ, evaluated in float64.
        curve: Validation figure of each epoch, for the report.
    """

    def __init__(
        self,
        base: SplineField | MassField,
        network: PotentialNetwork,
        curve: list[dict[str, float]] | None = None,
    ) -> None:
        self.base = base
        self.region: Region = base.region
        self.network = copy.deepcopy(network).double().eval().requires_grad_(False)
        self.curve = list(curve or [])

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*), up to a constant."""
        x = as_positions(x)
        return self.base.potential(x) + self.network(x.reshape(-1, 3)).reshape(x.shape[:-1])

    def acceleration(self, x: Any) -> Tensor:
        """a(x) = −∇Φ in (km/s)²/kpc, shape (*, 3)."""
        x = as_positions(x)
        parts = [self.network.gradient(*self.network.inputs(c)) for c in x.reshape(-1, 3).split(65_536)]
        return self.base.acceleration(x) - torch.cat(parts).reshape(x.shape)

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) = ∇²Φ/4πG in Msun/kpc³, shape (*)."""
        x = as_positions(x)
        parts = [_laplacian(self.network, c).detach() for c in x.reshape(-1, 3).split(65_536)]
        return self.base.mass_density(x) + torch.cat(parts).reshape(x.shape[:-1]) / (4 * math.pi * G)


def fit_potential(
    model_or_scores: Any,
    w: Any,
    settings: PotentialSettings,
    *,
    seed: int,
    ball: Any = None,
    weights: Any = None,
    partner: Any = None,
    on_epoch: Any = None,
) -> PotentialField | SplineField | MassField | MeanField:
    """Fit Φ to the score at the stars, or at draws from a flow.

    Arguments:
        model_or_scores: Scores ∇log f at `w`, shape (n, 6), or a model with ``score(w)``.
        w: States (n, 6) in kpc and km/s: the stars, or samples of the model.
        settings: Spline, network and training.
        seed: Seed of the masses' centres, of the network's start and of its batches.
        ball: The ball of the stars; None takes ``model.ball``.
        weights: One weight per star (n,), or None.
        partner: Scores, or a model, trained on other stars than the first: ``plain`` then minimises the
            product E[r₁r₂] of the two residuals, which has no noise floor and no bias; the other forms take
            the mean of both scores.
        on_epoch: Called with the dict of each epoch.

    Returns:
        A `SplineField` for ``basis = "spline"``, a `MassField` for ``"masses"``, else a `PotentialField`;
        the `MeanField` of three for ``form = "mean"``.

    Raises:
        GalrayError: No ball, shapes that do not match, values that are not finite, or too few stars.
    """
    ball = ball if ball is not None else getattr(model_or_scores, "ball", None)
    if ball is None:
        raise GalrayError(
            "fit_potential does not know the ball of the stars", "give ball=Ball(center, radius)"
        )
    region = as_region(ball)
    states = to_numpy(w)
    scores = scores_at(model_or_scores, w)
    second = None if partner is None else scores_at(partner, w)
    if settings.form == "mean":
        from galray.gravity.store import MeanField  # which knows every kind of field

        given: dict[str, Any] = {"seed": seed, "ball": ball, "weights": weights, "partner": second}
        each = [settings.model_copy(update={"form": form}) for form in get_args(Form)]
        return MeanField([fit_potential(scores, w, one, on_epoch=on_epoch, **given) for one in each])
    equations = _equations(states, scores, settings.form, settings, region, weights, second)
    number = int(equations.star.max()) + 1
    basis = None if settings.on_masses else spline_basis(settings, region)
    if basis is not None and number < basis.size:
        raise GalrayError(
            f"{number} stars within {settings.max_radius:g} of the ball for {basis.size} splines",
            "take more stars or fewer base_splines",
        )
    base: SplineField | MassField
    if basis is None:
        base = fit_masses(equations, region, settings, seed=seed)
    else:
        base = fit_spline_to_residuals(equations, basis, region, settings.penalty)
    if settings.basis != "network":
        return base
    rng = np.random.default_rng(seed)
    order = rng.permutation(number)[: settings.max_stars]
    held = np.zeros(number, dtype=bool)
    held[order[: max(1, round(settings.validation_fraction * len(order)))]] = True
    train = np.zeros_like(held)
    train[order] = True
    train &= ~held
    return _train(base, equations, train, held, settings, rng, on_epoch)


def choose_roundness(first: Any, second: Any, settings: PotentialSettings, *, seed: int, ball: Any) -> float:
    """The `PotentialSettings.roundness` that two halves of the stars find for each other.

    Masses are fitted to one half under priors of many strengths, and judged by the other half's equation, and
    the other way round. The halves share neither stars nor a model, so that the error of the one is not
    taken for the truth by the other. ``form = "mean"`` is chosen for by its first, ``plain``.

    Arguments:
        first: Scores (n, 6), or a model with ``score(w)``, and states (n, 6) in kpc and km/s of a half of
            the stars: the model has been trained on no others.
        second: The same of the other half.
        settings: Of the fit; its own `roundness` is ignored.
        seed: Decides which stars are centres.
        ball: The ball of the stars.

    Returns:
        One of `galray.gravity.roundness.ROUNDNESSES`; 0 where no prior helps.

    Raises:
        GalrayError: Settings without masses, and all errors of `fit_potential`.
    """
    if not settings.on_masses:
        raise GalrayError(f"a round mass for basis = '{settings.basis}'", "set basis = 'masses'")
    region = as_region(ball)
    form: Form = "plain" if settings.form == "mean" else settings.form
    halves = [
        _equations(to_numpy(w), scores_at(model, w), form, settings, region) for model, w in (first, second)
    ]
    missed = np.zeros(len(ROUNDNESSES))
    for own, other in (halves, halves[::-1]):
        for one in mass_sets(own, region, settings, seed=seed):
            missed += one.missed(other, ROUNDNESSES)
    return float(ROUNDNESSES[int(np.argmin(missed))])


def _equations(
    states: Array,
    scores: Array,
    form: Form,
    settings: PotentialSettings,
    region: Region,
    weights: Any = None,
    partner: Array | None = None,
) -> Equations:
    """What the stars say, the outermost of the ball faded out; arguments and errors as `fit_potential`'s."""
    if states.ndim != 2 or states.shape[1] != 6 or scores.shape != states.shape:
        raise GalrayError(
            f"states of shape {states.shape} with scores of shape {scores.shape}", "both must be (n, 6)"
        )
    if partner is not None and partner.shape != states.shape:
        raise GalrayError(
            f"states of shape {states.shape} with partner scores of shape {partner.shape}",
            "the partner's scores belong to the same stars",
        )
    factor = np.ones(len(states)) if weights is None else to_numpy(weights)
    distance = np.linalg.norm(states[:, :3] - np.array(region.center), axis=1) / region.radius
    factor = factor * taper(distance / settings.max_radius)
    finite = np.isfinite(scores).all(1) & (True if partner is None else np.isfinite(partner).all(1))
    keep = (factor > 0) & finite
    if (lost := int(((factor > 0) & ~keep).sum())) > 0.01 * len(states):
        raise GalrayError(
            f"{lost} of {len(states)} scores are not finite", "the model has diverged: train it again"
        )
    if not keep.any():
        raise GalrayError(
            f"none of {len(states)} stars lies within the ball", "give states in kpc and the stars' own ball"
        )
    return estimating_equations(
        states[keep],
        scores[keep],
        factor[keep],
        form,
        region,
        partner=None if partner is None else partner[keep],
    )


def _train(
    base: SplineField | MassField,
    equations: Equations,
    train_stars: NDArray[np.bool_],
    held_stars: NDArray[np.bool_],
    settings: PotentialSettings,
    rng: np.random.Generator,
    on_epoch: Any,
) -> PotentialField:
    region = base.region
    # units in which z, sᵥ and the acceleration are of order one
    speed = 1.0 / math.sqrt(float((equations.z**2).mean()))
    unit = speed**2 / region.radius
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        network = PotentialNetwork(region, settings.hidden, speed**2)
    last = network.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)  # the fit starts from the base
    used = (train_stars | held_stars)[equations.star]
    rows_of = equations.star[used]
    positions = torch.from_numpy(equations.x[used])
    features, jacobian = (t.float() for t in network.double().inputs(positions))
    network.float()
    start = (base.acceleration(positions) / unit).float()
    zs = torch.from_numpy(equations.z[used] * speed).float()
    sv = torch.from_numpy(equations.slope[used] * speed).float()
    c = torch.from_numpy(equations.streaming[used] * region.radius / speed).float()
    weight = torch.from_numpy(equations.weight[used] / equations.weight[used].mean()).float()
    held = torch.from_numpy(np.flatnonzero(held_stars[rows_of]))
    train = torch.from_numpy(np.flatnonzero(train_stars[rows_of]))
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))

    def acceleration(rows: Tensor) -> Tensor:
        return start[rows] - network.gradient(features[rows], jacobian[rows]) / unit

    def validate() -> float:
        """−⟨(z·a)(v·sₓ + ½ sᵥ·a)⟩: its expectation is smallest at the true a."""
        with torch.no_grad():
            total = 0.0
            for rows in held.split(65_536):
                a = acceleration(rows)
                value = -(zs[rows] * a).sum(1) * (c[rows] + (sv[rows] * a).sum(1) / 2)
                total += float((weight[rows] * value).sum().double())
            return total / len(held)

    curve = [{"epoch": 0.0, "validation": validate()}]
    best = (curve[0]["validation"], copy.deepcopy(network.state_dict()))
    for epoch in range(1, settings.epochs + 1):
        shuffled = train[torch.from_numpy(rng.permutation(len(train)))]
        for rows in shuffled.split(settings.batch_size):
            a = acceleration(rows)
            residual = c[rows] + (sv[rows] * a.detach()).sum(1)
            push = (weight[rows] * residual)[:, None] * zs[rows]
            loss = -(push * a).sum(1).mean()
            if settings.positivity > 0:
                loss = loss + settings.positivity * negative_mass(network, base, positions[rows[:256]])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimiser.step()
            schedule.step()
        curve.append({"epoch": float(epoch), "validation": validate()})
        if on_epoch is not None:
            on_epoch(curve[-1])
        if curve[-1]["validation"] < best[0]:
            best = (curve[-1]["validation"], copy.deepcopy(network.state_dict()))
    network.load_state_dict(best[1])

    # The output layer enters linearly: solve its estimating equation exactly, for several ridges.
    with torch.no_grad():
        width = last.weight.shape[1]
        matrix = torch.zeros(width, width, dtype=torch.float64)
        vector = torch.zeros(width, dtype=torch.float64)
        for rows in train.split(8192):
            slopes = network.hidden_gradient(features[rows], jacobian[rows]) * (network.scale / unit)
            left = (weight[rows, None, None] * zs[rows, :, None] * slopes).sum(1)
            right = (sv[rows, :, None] * slopes).sum(1)
            residual = c[rows] + (sv[rows] * start[rows]).sum(1)
            matrix -= (left.T @ right).double()
            vector -= (left.T @ residual[:, None])[:, 0].double()
        size = matrix.diagonal().clamp_min(1e-12 * float(matrix.diagonal().max())).sqrt()
        scaled = matrix / size / size[:, None]
        for ridge in (1e-5, 1e-4, 1e-3, 1e-2):
            solution = torch.linalg.solve(scaled + ridge * torch.eye(width), vector / size) / size
            last.weight.copy_(solution[None])
            curve.append({"epoch": settings.epochs + 1.0, "ridge": ridge, "validation": validate()})
            if curve[-1]["validation"] < best[0]:
                best = (curve[-1]["validation"], copy.deepcopy(network.state_dict()))
    network.load_state_dict(best[1])
    return PotentialField(base, network, curve)


def negative_mass(network: PotentialNetwork, base: SplineField | MassField, x: Tensor) -> Tensor:
    """Mean square of the negative part of 4πGρ, in units of its own typical size."""
    fixed = base.mass_density(x) * (4 * math.pi * G)
    laplacian = _laplacian(network, x.float(), create_graph=True)
    total = fixed.float() + laplacian
    return (total.clamp_max(0) / fixed.abs().mean().float()).square().mean()


def _laplacian(network: PotentialNetwork, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """∇²ψ at positions x (n, 3), shape (n,)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (first,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        parts = [
            torch.autograd.grad(first[:, i].sum(), x, create_graph=create_graph, retain_graph=True)[0][:, i]
            for i in range(3)
        ]
    return torch.stack(parts).sum(0)


def scores_at(model_or_scores: Any, w: Any, method: str = "score") -> Array:
    """Scores of a model at states w (n, 6) by one of its methods, or scores as they are given: (n, 6)."""
    if not hasattr(model_or_scores, method):
        return to_numpy(model_or_scores)
    states, evaluate = torch.as_tensor(w).to(torch.float64), getattr(model_or_scores, method)
    return np.concatenate([to_numpy(evaluate(chunk)) for chunk in states.split(32_768)])


def taper(s: Array) -> Array:
    """1 up to s = 0.9, falling smoothly to 0 at s = 1."""
    u = np.clip((1 - s) / 0.1, 0, 1)
    return u * u * (3 - 2 * u)
