"""The settings of the phase-space models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from galray.phasespace.noise_settings import NoiseSettings
from galray.settings import Settings

__all__ = ["Activation", "BaseSettings", "Coordinates", "FlowPart", "FlowSettings", "ScoreSettings"]

Coordinates = Literal["cartesian", "cylindrical"]
Activation = Literal["tanh", "silu", "softplus"]


class FlowPart(Settings):
    """One of the two flows of f = n(x) p(v|x)."""

    kind: Literal["mixture", "nsf", "maf", "gaussians", "continuous"] = "mixture"
    """``mixture``: autoregressive Gaussian mixtures; ``nsf`` and ``maf``: autoregressive splines (two
    continuous derivatives) and affine maps; ``gaussians``: Gaussians with full covariances, whose integral
    along a line of sight is in closed form; ``continuous``: an ODE trained by flow matching. The score of all
    of them is continuous."""
    transforms: int = Field(default=0, ge=0)
    """Autoregressive transforms before the base density: a mixture needs none, nsf and maf two or more."""
    hidden: tuple[int, ...] = Field(default=(64, 64), min_length=1)
    """Hidden widths of every network."""
    bins: int = Field(default=8, ge=2)
    """Gaussians per coordinate (mixture), in all (gaussians), or spline bins (nsf)."""
    rotate: bool = True
    """Go along axes turned at random with the seed, which differ between members (mixture, nsf, maf)."""
    steps: int = Field(default=12, ge=2)
    """Runge-Kutta steps from the Gaussian to the data (continuous)."""

    @model_validator(mode="after")
    def _consistent(self) -> FlowPart:
        if self.kind in ("nsf", "maf") and self.transforms == 0:
            raise ValueError(f"transforms = 0 leaves kind '{self.kind}' a bare Gaussian; use 2 or more")
        if self.kind in ("gaussians", "continuous") and self.transforms:
            raise ValueError(f"kind '{self.kind}' has no autoregressive transforms; leave transforms = 0")
        return self


class FlowSettings(Settings):
    """A normalizing flow of phase space."""

    coordinates: Coordinates = "cartesian"
    """Internal coordinates: ``cylindrical`` suits discs (azimuth stays an input), ``cartesian`` the rest."""
    conditional: bool = False
    """Learn p(v|x) alone, which no selection in position can bias; `position` is then not used."""
    position: FlowPart = FlowPart(kind="gaussians", bins=24)
    """n(x), in ball-transformed coordinates."""
    velocity: FlowPart = FlowPart(hidden=(64, 64, 64), bins=4)
    """p(v|x), in standardised velocity components."""
    noise: NoiseSettings = NoiseSettings()
    """What training does with measurement errors."""
    missing_rv: Literal["leave_out", "marginalise"] = "leave_out"
    """Stars without radial velocity: left out, or added with the likelihood integrated over the velocity that
    they miss. A run then needs ``catalog.require_rv = false``. ``gaussians`` have it in closed form."""
    sun_position: tuple[float, float, float] | None = None
    """Where the lines of sight of ``missing_rv`` start, in kpc. A run takes the Sun's where none is given."""

    @model_validator(mode="after")
    def _marginalisable(self) -> FlowSettings:
        refused = self.conditional or self.velocity.kind == "continuous"
        if self.missing_rv == "marginalise" and (refused or self.noise.treatment == "deconvolve"):
            raise ValueError(
                "missing_rv: a missing velocity is integrated out of the likelihood of f(x, v) as measured: "
                "not of a conditional or continuous flow, nor together with noise.treatment = 'deconvolve'"
            )
        return self

    @model_validator(mode="after")
    def _convolvable(self) -> FlowSettings:
        if self.noise.treatment == "deconvolve" and (
            self.conditional or "continuous" in (self.position.kind, self.velocity.kind)
        ):
            raise ValueError(
                "noise: errors in position and velocity are deconvolved from the likelihood of f(x, v); a "
                "conditional flow has none, and a continuous one is not trained by it"
            )
        return self


class BaseSettings(Settings):
    """The analytic base that the score network starts from."""

    components: int = Field(default=1, ge=1)
    """Gaussians in velocity, each with mean, covariance and weight that vary with position. What a rich base
    learns by heart of the stars, the network, trained on the same stars, does not see and cannot mend."""
    hidden: tuple[int, ...] = Field(default=(32, 32), min_length=1)
    """Hidden widths of the two networks of position."""
    noise_ratio: int = Field(default=3, ge=1)
    """Reference positions per star in the fit of n(x): more make it less noisy and dearer."""
    star_passes: float = Field(default=5e5, gt=0)
    """Stars shown to each of the two fits, repetitions counted. More cost more, and learn stars by heart."""
    batch_size: int = Field(default=1024, ge=1)
    """Stars per step of the fits."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Peak learning rate of the fits (Adam, one-cycle)."""


class ScoreSettings(Settings):
    """A score network."""

    coordinates: Coordinates = "cartesian"
    """Internal coordinates: ``cylindrical`` suits discs (azimuth stays an input), ``cartesian`` the rest."""
    form: Literal["gradient", "vector"] = "gradient"
    """``gradient``: s = ∇g of a scalar network, free of curl; ``vector``: free components, cheaper a step."""
    hidden: tuple[int, ...] = Field(default=(64, 64, 64), min_length=1)
    """Hidden widths of the correction network; ``vector`` costs least with two layers."""
    activation: Activation = "silu"
    """Smooth activation: silu, tanh or softplus."""
    base: BaseSettings = BaseSettings()
    """The analytic base that the network corrects."""
    objective: Literal["implicit", "sliced", "denoising"] = "implicit"
    """Score matching with the exact divergence, with the second derivative along one random direction a
    step, or without derivatives, of the density smoothed by `smoothing`."""
    smoothing: float = Field(default=0.1, gt=0)
    """Noise of ``denoising``, in standard deviations of each internal coordinate; the bias grows as the
    square."""
    velocity_weight: float | None = Field(default=None, gt=0)
    """Stars weigh as 1 / (1 + |v|²/c²) in the loss, v in standard deviations and c this figure, so that few
    fast ones cannot rule a step; none weighs all alike. The loss stays exact."""
    noise: NoiseSettings = NoiseSettings()
    """What training does with measurement errors."""

    @model_validator(mode="after")
    def _one_objective(self) -> ScoreSettings:
        plain = self.objective == "implicit" and self.velocity_weight is None
        if self.noise.treatment == "deconvolve" and not plain:
            raise ValueError(
                "noise.treatment = 'deconvolve' has an objective of its own: leave objective and "
                "velocity_weight at their defaults"
            )
        return self
