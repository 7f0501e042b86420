"""The Boltzmann equation in a frame that turns and moves: pattern speed and gravity from scores, together.

A distribution that is steady in a frame of velocity u(x) = u₀ + Ω × (x − x₀) obeys, with inertial v,

    (v − u)·∂ₓ ln f + (a − Ω × v)·∂ᵥ ln f = 0,

that is v·sₓ + a·sᵥ = Ω q + u₀·sₓ, where q = (Ω̂ × x)·sₓ + (Ω̂ × v)·sᵥ is how ln f changes along a turn about
the axis. The equation is linear in a = −∇Φ, Ω and u₀ at once. Where f is the same at every
azimuth q vanishes and Ω cannot be known; the part of q that no acceleration imitates is what Ω rests on.

Noise in a score would make q look larger than it is and draw Ω towards zero. With scores of several models
trained on disjoint stars only products of different models enter, Σ_{j≠k} E[r_j r_k], which no noise biases.

References:
    Green, Ting & Kamdar 2023, ApJ 942, 26, eq. 15, with the turning of the inertial velocity added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import linalg, stats

from galray.errors import GalrayError
from galray.gravity.instrument import VelocityMoments
from galray.gravity.region import Region, as_region
from galray.gravity.settings import PotentialSettings, RotatingSettings
from galray.gravity.spline_field import SplineField
from galray.gravity.spline_fit import spline_basis
from galray.gravity.splines import Array, TensorBasis, cell_groups, to_numpy

__all__ = ["CorotatingModel", "RotatingFit", "RotatingFrame", "fit_rotating_frame"]

_FOLDS = 5
_LEAST_TURNING = 1e-8  # in kpc/(km/s): a q smaller than this part of v·sₓ is round-off
_STRENGTHS = 10.0 ** np.arange(-8.0, 1.0)


@dataclass(frozen=True)
class RotatingFrame:
    """A frame that turns about an axis parallel to z, and may move.

    Attributes:
        pattern_speed: Ω in km/s/kpc, positive along Galactic rotation.
        center: Where the axis meets the plane, (x, y) in kpc.
        velocity: u₀ in km/s.
    """

    pattern_speed: float
    center: tuple[float, float] = (0.0, 0.0)
    velocity: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def steady_scores(self, w: Any, scores: Any) -> Array:
        """Scores whose v·sₓ is the streaming as this frame sees it, v·sₓ − Ω q − u₀·sₓ.

        Every solver of this package uses sₓ in the product v·sₓ alone, so with these scores each of them
        solves the equation of the frame. The rest of sₓ keeps its direction across v; it is no gradient.

        Arguments:
            w: States (n, 6).
            scores: ∇log f there, (n, 6).

        Returns:
            Shape (n, 6), float64.
        """
        states, s = to_numpy(w), to_numpy(scores).copy()
        v = states[:, 3:]
        moved = self.pattern_speed * _turning(states, s, self.center) + s[:, :3] @ np.array(self.velocity)
        s[:, :3] -= (moved / np.maximum((v**2).sum(1), 1e-12))[:, None] * v
        return s


class CorotatingModel:
    """A phase-space model as seen from a turning frame: any inversion of it solves that frame's equation.

    Arguments:
        model: Anything with ``score(w)``; ``sample_velocity`` and ``ball`` are passed on.
        frame: The frame.
    """

    def __init__(self, model: Any, frame: RotatingFrame) -> None:
        self.model = model
        self.frame = frame

    def __getattr__(self, name: str) -> Any:
        if name in ("sample_velocity", "ball"):
            return getattr(self.model, name)
        raise AttributeError(f"CorotatingModel has no attribute '{name}'")

    def score(self, w: torch.Tensor) -> torch.Tensor:
        """The model's score with the frame's streaming, see `RotatingFrame.steady_scores`; shape (*, 6)."""
        flat = w.reshape(-1, 6)
        steady = self.frame.steady_scores(flat, self.model.score(flat).detach())
        return torch.from_numpy(steady).reshape(w.shape)


@dataclass(frozen=True)
class RotatingFit:
    """What `fit_rotating_frame` found.

    Attributes:
        frame: The frame: its pattern speed is fitted or as given.
        error: Standard error of the pattern speed in km/s/kpc; 0 where it was given.
        velocity_error: Of u₀ in km/s, zeros where it was not fitted.
        known: Whether the stars determine the pattern speed.
        asymmetry: Root mean square of the part of q that only a turning frame explains, times the stars'
            own typical v_φ/R, over that of v·sₓ: 0 for an axisymmetric sample.
        strength: Its square's estimate over its own standard error.
        field: The spline potential of the joint fit.
        sentence: One sentence on the pattern speed.
    """

    frame: RotatingFrame
    error: float
    velocity_error: tuple[float, float, float]
    known: bool
    asymmetry: float
    strength: float
    field: SplineField
    sentence: str


def fit_rotating_frame(
    scores: Any,
    w: Any,
    settings: PotentialSettings,
    *,
    ball: Any,
    rotating: RotatingSettings | None = None,
) -> RotatingFit:
    """Fit Φ, as a spline, together with the pattern speed and, on request, the frame's velocity.

    Arguments:
        scores: ∇log f at the stars, (n, 6); or several, each of a model trained on other stars. Three or more
            give an error that holds the models' own noise; fewer, one of the stars alone.
        w: States (n, 6) in kpc and km/s, rows in random order.
        settings: The spline: take ``base = "xyz"``, since an axisymmetric one leaves nothing to turn.
        ball: The ball of the stars.
        rotating: What is fitted and when it counts as known.

    Raises:
        GalrayError: Shapes that do not match, an axisymmetric base, or too few stars.
    """
    rotating = rotating or RotatingSettings()
    region = as_region(ball)
    states = to_numpy(w)
    models = _scores_of(scores, states)
    if settings.base != "xyz":
        raise GalrayError(
            "a turning frame with a potential in (R, z)", "set base = 'xyz': a bar depends on azimuth"
        )
    states, models, weight = _weighted(states, models, region, settings.max_radius)
    basis = spline_basis(settings, region)
    if len(states) < 4 * basis.size:
        raise GalrayError(f"{len(states)} stars for {basis.size} splines", "take more stars or fewer splines")
    given = rotating.pattern_speed
    free = _FreeMotion(rotating)
    sums = _sum_products(states, models, weight, basis, free)
    solver = _Solver(basis, free.scales(states, models))
    strength_of_penalty = solver.penalty(sums.by_block)

    def answer(matrix: Array, vector: Array) -> tuple[Array, Array, float]:
        return solver.solve(matrix, vector, strength_of_penalty)

    theta, motion, information = answer(*sums.total())
    pieces = [_jackknife([answer(*r) for r in sums.without_blocks()])]
    if len(models) >= 3:
        pieces.append(_jackknife([answer(*r) for r in sums.without_models(len(models))]))
    motion_error = np.sqrt(sum((p[0] for p in pieces), np.zeros(free.count)))
    information_error = math.sqrt(sum(p[1] for p in pieces))
    field = SplineField(basis, region, theta, penalty=(strength_of_penalty,) * len(basis.axes))

    speed, error = (given, 0.0) if given is not None else (float(motion[0]), float(motion_error[0]))
    velocity = np.zeros(3) if not rotating.translation else motion[-3:]
    velocity_error = np.zeros(3) if not rotating.translation else motion_error[-3:]
    plane = states[:, :2] - np.array(rotating.center_kpc)
    around = (plane[:, 1] * states[:, 3] - plane[:, 0] * states[:, 4]) / np.hypot(plane[:, 0], plane[:, 1])
    typical = math.sqrt((around**2).mean() / (plane**2).sum(1).mean())  # the stars' own rate, km/s/kpc
    asymmetry = typical * math.sqrt(max(information, 0.0) / sums.streaming)
    strength = information / information_error if information_error > 0 else math.inf
    if given is not None:
        known = True
        sentence = f"The frame turns with the {given:g} km/s/kpc that were given."
    else:
        known = (
            asymmetry >= rotating.min_asymmetry
            and strength >= rotating.min_strength
            and error <= rotating.max_error
        )
        sentence = _sentence(known, speed, error, asymmetry, strength, len(models))
    x, y, z = (float(c) for c in velocity)
    frame = RotatingFrame(speed, rotating.center_kpc, (x, y, z))
    ex, ey, ez = (float(c) for c in velocity_error)
    return RotatingFit(frame, error, (ex, ey, ez), known, asymmetry, strength, field, sentence)


def _sentence(known: bool, speed: float, error: float, asymmetry: float, strength: float, models: int) -> str:
    size = f"{100 * asymmetry:.2g} % of the streaming, {strength:.1f} times its own error"
    if not known:
        return (
            f"The pattern speed cannot be known from these stars: they look too nearly the same at every "
            f"azimuth (the asymmetry is {size})."
        )
    caution = "" if models >= 3 else "; the error leaves out the noise of the models"
    return f"Ω_p = {speed:.1f} ± {error:.1f} km/s/kpc (the asymmetry is {size}{caution})."


class _FreeMotion:
    """Columns of the frame's motion: q for Ω, sₓ for u₀; and what a given Ω takes off the target."""

    def __init__(self, rotating: RotatingSettings) -> None:
        self.rotating = rotating
        self.count = (rotating.pattern_speed is None) + 3 * rotating.translation

    def columns(self, w: Array, s: Array) -> tuple[Array, Array]:
        """(columns (n, count), streaming (n,)) of one model."""
        streaming = (w[:, 3:] * s[:, :3]).sum(1)
        turning = _turning(w, s, self.rotating.center_kpc)
        parts = []
        if self.rotating.pattern_speed is None:
            parts.append(turning[:, None])
        else:
            streaming = streaming - self.rotating.pattern_speed * turning
        if self.rotating.translation:
            parts.append(s[:, :3])
        return np.concatenate([np.empty((len(w), 0)), *parts], 1), streaming

    def scales(self, w: Array, models: list[Array]) -> Array:
        """Sizes of the columns relative to sᵥ (count,), never so small that round-off would count."""
        total = np.zeros(self.count)
        pull = streaming = 0.0
        for s in models:
            columns, flow = self.columns(w, s)
            total += (columns**2).mean(0)
            pull += float((s[:, 3:] ** 2).mean())
            streaming += float((flow**2).mean())
        least = np.full(self.count, streaming * _LEAST_TURNING**2)
        return np.asarray(np.sqrt(pull / np.maximum(total, least)))


@dataclass
class _Products:
    """Normal equations of Σ_{j≠k} r_j r_k, per block of stars and per model left out."""

    by_block: list[tuple[Array, Array]]
    by_model: list[tuple[Array, Array]]  # products of each model with all others
    streaming: float

    def total(self) -> tuple[Array, Array]:
        return _added(self.by_block)

    def without_blocks(self) -> list[tuple[Array, Array]]:
        matrix, vector = self.total()
        scale = len(self.by_block) / (len(self.by_block) - 1)
        return [(scale * (matrix - m), scale * (vector - v)) for m, v in self.by_block]

    def without_models(self, count: int) -> list[tuple[Array, Array]]:
        matrix, vector = self.total()
        scale = count / (count - 2)  # (count)(count − 1) pairs become (count − 1)(count − 2)
        return [(scale * (matrix - 2 * m), scale * (vector - 2 * v)) for m, v in self.by_model]


def _sum_products(
    states: Array, models: list[Array], weight: Array, basis: TensorBasis, free: _FreeMotion
) -> _Products:
    """Sum D_jᵀD_k and D_jᵀt_k over stars and pairs of models; symmetric in j and k."""
    blocks, num = free.rotating.num_blocks, len(models)
    size = basis.size + free.count
    extra = basis.size + np.arange(free.count)
    by_block = [(np.zeros((size, size)), np.zeros(size)) for _ in range(blocks)]
    by_model = [(np.zeros((size, size)), np.zeros(size)) for _ in range(num)]
    block = np.arange(len(states)) % blocks
    pairs = num * (num - 1) if num > 1 else 1
    streaming = 0.0
    for cell, rows in cell_groups(basis.locate(basis.coordinates(states[:, :3]))):
        index = np.concatenate([basis.indices(cell), extra])
        grid = np.ix_(index, index)
        _, slopes = basis.gradient(states[rows, :3])
        root = np.sqrt(weight[rows] / pairs)
        design, target = [], []
        for s in models:
            columns, flow = free.columns(states[rows], s[rows])
            pulls = np.einsum("nj,njp->np", s[rows, 3:], slopes)
            design.append(root[:, None] * np.concatenate([pulls, columns], 1))
            target.append(root * flow)
        all_design, all_target = np.sum(design, axis=0), np.sum(target, axis=0)
        for b in range(blocks):
            part = block[rows] == b
            d, t = all_design[part], all_target[part]
            matrix, vector = d.T @ d, d.T @ t
            flow2 = float((t**2).sum())
            if num > 1:
                for one, own in zip(design, target, strict=True):
                    matrix -= one[part].T @ one[part]
                    vector -= one[part].T @ own[part]
                    flow2 -= float((own[part] ** 2).sum())
            by_block[b][0][grid] += matrix
            by_block[b][1][index] += vector
            streaming += flow2
        if num >= 3:
            for k, (one, own) in enumerate(zip(design, target, strict=True)):
                rest, others = all_design - one, all_target - own
                cross = one.T @ rest
                by_model[k][0][grid] += (cross + cross.T) / 2
                by_model[k][1][index] += (one.T @ others + rest.T @ own) / 2
    return _Products(by_block, by_model, streaming)


class _Solver:
    """(M + λP) (θ, μ) = m, the spline penalised and the motion μ free."""

    def __init__(self, basis: TensorBasis, scales: Array) -> None:
        self.count = count = len(scales)
        self.scales = scales
        self.reduction = linalg.block_diag(basis.reduction(north_south=False), np.diag(scales))
        self.roughness = [linalg.block_diag(r, np.zeros((count, count))) for r in basis.roughness()]

    def _prior(self, matrix: Array, strength: float) -> Array:
        size = len(matrix)
        splines = size - self.count
        level = np.trace(matrix[:splines, :splines]) / splines
        if not level > 0:
            raise GalrayError(
                "the scores do not determine a potential: their products have the wrong sign",
                "the models are far from ∇log f: train them longer, or on more stars each",
            )
        prior = 1e-9 * level * np.eye(size)
        prior[:splines, :splines] += level / splines
        for rough in self.roughness:
            reduced = self.reduction.T @ rough @ self.reduction
            prior += strength * reduced * (level * splines / np.trace(reduced))
        return prior

    def _reduced(self, matrix: Array, vector: Array) -> tuple[Array, Array]:
        return self.reduction.T @ matrix @ self.reduction, vector @ self.reduction

    def penalty(self, blocks: Sequence[tuple[Array, Array]]) -> float:
        """The strength that predicts held-out fifths of the stars best."""
        reduced = [self._reduced(m, v) for m, v in blocks]
        folds = [_added(reduced[k::_FOLDS]) for k in range(_FOLDS)]
        total, right = _added(reduced)
        values = []
        for strength in _STRENGTHS:
            value = 0.0
            for m, v in folds:
                rest = total - m
                solution = linalg.solve(rest + self._prior(rest, strength), right - v, check_finite=False)
                value += float(solution @ m @ solution / 2 - v @ solution)
            values.append(value)
        return float(_STRENGTHS[int(np.argmin(values))])

    def solve(self, matrix: Array, vector: Array, strength: float) -> tuple[Array, Array, float]:
        """Spline coefficients, motion, and the information on the first of the motion's numbers."""
        m, v = self._reduced(matrix, vector)
        full = m + self._prior(m, strength)
        solution = linalg.solve(full, v, check_finite=False)
        whole = self.reduction @ solution
        if not self.count:
            return whole, whole[:0], 0.0
        first = len(m) - self.count
        unit = np.zeros(len(m))
        unit[first] = 1.0
        information = 1.0 / float(linalg.solve(full, unit, check_finite=False)[first]) / self.scales[0] ** 2
        return whole[: -self.count], whole[-self.count :], information


def _added(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.sum([m for m, _ in parts], axis=0), np.sum([v for _, v in parts], axis=0)


def _jackknife(replicas: list[tuple[Array, Array, float]]) -> tuple[Array, float]:
    """Variances of the motion and of the information, for few replicas those of 68 % bands."""
    motion = np.array([r[1] for r in replicas]).reshape(len(replicas), -1)
    information = np.array([r[2] for r in replicas])
    n = len(replicas)
    widen = float(stats.t.ppf(0.8413, n - 1)) ** 2
    scale = widen * (n - 1) / n
    return scale * ((motion - motion.mean(0)) ** 2).sum(0), scale * float(
        ((information - information.mean()) ** 2).sum()
    )


def _turning(w: Array, s: Array, center: tuple[float, float]) -> Array:
    """q, the change of ln f per radian along Galactic rotation, which goes as (y, −x)."""
    x, y = w[:, 0] - center[0], w[:, 1] - center[1]
    return y * s[:, 0] - x * s[:, 1] + w[:, 4] * s[:, 3] - w[:, 3] * s[:, 4]


def _scores_of(scores: Any, states: Array) -> list[Array]:
    several = isinstance(scores, (list, tuple)) or to_numpy(scores).ndim == 3
    models = [to_numpy(s) for s in scores] if several else [to_numpy(scores)]
    for k, s in enumerate(models):
        if states.ndim != 2 or states.shape[1] != 6 or s.shape != states.shape:
            raise GalrayError(
                f"states of shape {states.shape} with scores {k} of shape {s.shape}", "both must be (n, 6)"
            )
    return models


def _weighted(
    states: Array, models: list[Array], region: Region, max_radius: float
) -> tuple[Array, list[Array], Array]:
    """Stars with weights that vanish at the border and bound the influence of the fastest."""
    distance = np.linalg.norm(states[:, :3] - np.array(region.center), axis=1) / region.radius / max_radius
    u = np.clip((1 - distance) / 0.1, 0, 1)
    taper = u * u * (3 - 2 * u)
    keep = (taper > 0) & np.isfinite(states).all(1)
    finite = np.logical_and.reduce([np.isfinite(s).all(1) for s in models])
    if (lost := int((keep & ~finite).sum())) > 0.01 * len(states):
        raise GalrayError(
            f"{lost} of {len(states)} scores are not finite", "the model has diverged: train it again"
        )
    keep &= finite
    states, models, taper = states[keep], [s[keep] for s in models], taper[keep]
    if len(states) < 1000:
        raise GalrayError(f"{len(states)} stars in the ball", "take more stars")
    velocities = VelocityMoments(states, region)
    centred = states[:, 3:] - velocities.mean(states[:, :3])
    solved = np.linalg.solve(velocities.covariance(states[:, :3]), centred[..., None])[..., 0]
    return states, models, taper / (1 + (solved * centred).sum(1))
