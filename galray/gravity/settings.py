"""The [gravity] section of a configuration: inversions, smoothing kernel, baryons, averages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from galray.gravity.moment_settings import MomentsSettings, check_concentration
from galray.settings import Settings

__all__ = [
    "BaryonSettings",
    "DustSettings",
    "GravitySettings",
    "HaloSettings",
    "KernelSettings",
    "LeastSquaresSettings",
    "PotentialSettings",
    "ProfileName",
]

ProfileName = Literal["nfw", "gnfw", "einasto"]


class KernelSettings(Settings):
    """The Gaussian kernel with which every mass density is smoothed."""

    widths_kpc: tuple[float, float, float] = (0.5, 0.5, 0.2)
    """Standard deviations along x, y and z."""
    truncate: float = Field(default=2.0, gt=0, le=6)
    """The kernel ends at the ellipsoid of this many standard deviations."""
    radial_nodes: int = Field(default=6, ge=2, le=64)
    """Quadrature nodes from the centre of the kernel to its surface."""
    polar_nodes: int = Field(default=16, ge=4, le=256)
    """Quadrature nodes from pole to pole (even: north and south get mirrored nodes)."""
    azimuthal_nodes: int = Field(default=8, ge=4, le=256)
    """Quadrature nodes around the z axis (even)."""

    @field_validator("widths_kpc")
    @classmethod
    def _positive(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0:
            raise ValueError("every width must be above zero kpc")
        return value


class LeastSquaresSettings(Settings):
    """Least squares over resampled velocities at fixed position."""

    form: Literal["instrument", "stein", "plain"] = "instrument"
    """Which estimating equation: see `galray.gravity.boltzmann`."""
    num_velocities: int = Field(default=2000, ge=8)
    """Velocities drawn at each position."""
    clip: float | None = Field(default=None, gt=1)
    """Velocities whose residual exceeds so many robust standard deviations are set aside; none keeps all."""
    batch_size: int = Field(default=50_000, gt=0)
    """Phase-space points scored at once."""


class PotentialSettings(Settings):
    """A potential fitted to scores at the stars: a spline, Gaussian masses, or a network on either."""

    basis: Literal["spline", "masses", "network"] = "network"
    """``spline`` solves one linear system; ``masses`` are Gaussians that cannot be negative, best where the
    stars hold the mass that pulls them; ``network`` adds a network that learns what its base misses."""
    form: Literal["plain", "instrument", "stein", "mean"] = "plain"
    """``plain`` is E[r²], the most precise on well-trained models; ``instrument`` and ``stein`` are free of
    the bias towards zero that noise in the score causes, with more scatter; ``mean`` is the mean of all
    three, whose errors differ, at five times the cost."""
    base: Literal["Rz", "xyz", "masses"] = "Rz"
    """What the network stands on: a spline in these coordinates, or Gaussian masses. The network on top knows
    all three coordinates: ``Rz`` with a network starts from axial symmetry and is not bound to it."""
    num_masses: int = Field(default=400, ge=10, le=5000)
    """Gaussian masses, centred on so many of the stars."""
    mass_sets: int = Field(default=4, ge=1, le=100)
    """Sets of centres, each another draw and solved for on its own; the potential is their mean."""
    mass_width: float = Field(default=1.5, gt=0)
    """Their standard deviations in units of the distance to the eighth nearest other centre."""
    tide_order: int = Field(default=3, ge=0, le=8)
    """Largest degree of the solid harmonics that stand for the mass beyond the ball (``masses`` only)."""
    roundness: float = Field(default=0.0, ge=0)
    """Strength of a prior that the masses are round about the stars' median, for a halo or a cluster of its
    own and not for a part of a disc; 0 for none. `choose_roundness` finds it from two halves of the stars."""
    base_splines: tuple[int, ...] = ()
    """Splines along each coordinate; () takes (6, 9) for Rz and (6, 6, 9) for xyz."""
    concentration: tuple[float, ...] = ()
    """β per coordinate of the spline's cells, as in the moments; () takes (0, 2) or (0, 0, 2)."""
    penalty: float | None = Field(default=None, gt=0)
    """Strength of the splines' penalty of third differences (0.03 suits networks of a million disc stars);
    none chooses it by held-out stars, which share the errors of the model that gave them their scores."""
    hidden: tuple[int, ...] = (64, 128)
    """Widths of the network's hidden layers."""
    epochs: int = Field(default=6, ge=1)
    """Passes over the stars."""
    batch_size: int = Field(default=2048, ge=16)
    """Stars per step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Adam's largest step; it falls to zero along a cosine."""
    max_stars: int = Field(default=150_000, ge=100)
    """Stars used by the network at most (a random part of a larger catalogue; the spline uses all)."""
    max_radius: float = Field(default=0.95, gt=0, le=1)
    """Stars fade out towards this fraction of the ball's radius, where scores are worst."""
    positivity: float = Field(default=0.0, ge=0)
    """Weight of the penalty on negative mass density (network only)."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.9)
    """Part of the stars that selects the best epoch."""

    @model_validator(mode="after")
    def _sizes(self) -> PotentialSettings:
        dimension = 2 if self.base == "Rz" else 3
        if self.base_splines and (len(self.base_splines) != dimension or min(self.base_splines) < 4):
            raise ValueError(f"base_splines: the {self.base} base takes {dimension} numbers of at least 4")
        check_concentration(self.concentration, dimension)
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError("hidden: at least one layer of at least one unit")
        if self.basis == "spline" and self.base == "masses":
            raise ValueError("base: masses without a network are basis = 'masses'")
        if self.roundness and not self.on_masses:
            raise ValueError("roundness: only masses have it, basis or base = 'masses'")
        return self

    @property
    def on_masses(self) -> bool:
        """Whether Gaussian masses take the spline's place."""
        return self.basis == "masses" or (self.basis == "network" and self.base == "masses")

    @property
    def splines(self) -> tuple[int, ...]:
        """The number of base splines along each coordinate, defaults filled in."""
        return self.base_splines or ((6, 9) if self.base == "Rz" else (6, 6, 9))

    @property
    def concentrations(self) -> tuple[float, ...]:
        """The concentration along each coordinate, defaults filled in."""
        return self.concentration or ((0.0, 2.0) if self.base == "Rz" else (0.0, 0.0, 2.0))


class DustSettings(Settings):
    """A potential and a selection efficiency ε(x) fitted together to a model of the stars that are seen."""

    variant: Literal["joint", "conditional"] = "joint"
    """``joint``: from the score of f_obs = ε f, Φ and log ε; ``conditional``: from p(v|x) alone, which ε
    cannot touch, Φ and the true density n(x), whence ε = n_obs/n."""
    basis: Literal["spline", "network", "moments"] = "network"
    """``spline`` solves one linear system for both; ``network`` adds networks that learn what it misses;
    ``moments`` (conditional only) takes splines too, but tests the equation with functions of the stars'
    velocities in place of the model's scores, whose noise pulls Φ and n towards zero."""
    potential_basis: Literal["Rz", "xyz"] = "Rz"
    """Coordinates of the splines of Φ; networks on top know all three."""
    num_potential_splines: tuple[int, ...] = ()
    """Splines of Φ along each coordinate; () takes (8, 15) or (7, 7, 9)."""
    selection_basis: Literal["Rz", "xyz"] = "xyz"
    """Coordinates of the splines of log ε (joint) or of log n (conditional)."""
    num_selection_splines: tuple[int, ...] = ()
    """Splines of log ε or log n along each coordinate; () takes (6, 9) or (5, 5, 7)."""
    concentration: tuple[float, ...] = ()
    """β per coordinate of the cells of Φ, as in the moments."""
    selection_concentration: tuple[float, ...] = ()
    """β per coordinate of the cells of log ε or log n."""
    penalty: float | Literal["cv", "evidence"] = "cv"
    """Strength of the third-difference penalty on both, or how to choose it: the smoothness of Φ and ε."""
    selection_amplitude: float = Field(default=3.0, gt=0)
    """Standard deviation of log ε (or log n) beforehand: a prior whose pull is told by exchanging it."""
    positive_mass: bool = False
    """Hold ρ ≥ 0 at the nodes of a grid (spline), and press the networks towards it."""
    monotone: bool = False
    """Let ε nowhere grow with the distance from the Sun (joint only)."""
    convention: Literal["maximum", "sun"] = "maximum"
    """ε is known up to a factor: 1 at its maximum, or at the centre of the ball, the Sun; never above 1."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of both networks."""
    epochs: int = Field(default=6, ge=1)
    """Passes over the stars."""
    batch_size: int = Field(default=2048, ge=16)
    """Stars per step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Adam's largest step; it falls to zero along a cosine."""
    max_stars: int = Field(default=150_000, ge=100)
    """Stars used at most (a random part of a larger catalogue)."""
    max_radius: float = Field(default=0.95, gt=0, le=1)
    """Stars fade out towards this fraction of the ball's radius, where models are worst."""
    min_efficiency: float = Field(default=0.01, gt=0, lt=1)
    """Below it stars say nothing of ε: its lower bound."""
    max_bound_fraction: float = Field(default=0.2, gt=0, le=1)
    """A fit with ε at its bounds in more than this fraction of the volume is refused."""
    sky_distance_kpc: float = Field(default=3.25, gt=0)
    """Distance of the shell of which a run draws the sky, before and after the correction."""
    max_degeneracy: float = Field(default=0.5, gt=0)
    """A tracer is refused as isothermal within the noise when a direction in which Φ and log ε cannot be told
    apart leaves the acceleration uncertain by more than this fraction."""

    @model_validator(mode="after")
    def _consistent(self) -> DustSettings:
        if self.variant == "conditional" and self.monotone:
            raise ValueError("monotone: only ε falls with distance, and 'conditional' fits n(x)")
        if self.variant == "joint" and self.basis == "moments":
            raise ValueError("basis: the moments' joint fit is [gravity.moments] selection = 'shared'")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError("hidden: at least one layer of at least one unit")
        self.splines()
        return self

    def splines(self) -> MomentsSettings:
        """The bases, as the moments describe them; two thirds as many tests along each axis as Φ has splines.

        Fewer than where ε is solved for: stars of a Plummer sphere behind dust tell no more with more tests.
        """
        bases = MomentsSettings(
            penalty=self.penalty,
            basis=self.potential_basis,
            num_potential_splines=self.num_potential_splines,
            concentration=self.concentration,
            selection="shared",
            selection_basis=self.selection_basis,
            num_selection_splines=self.num_selection_splines,
            selection_concentration=self.selection_concentration,
            selection_amplitude=self.selection_amplitude,
            selection_monotone=self.monotone,
            positive_mass=self.positive_mass,
        )
        tests = tuple(max(n - n // 3, 4) for n in bases.potential_splines)
        return bases.model_copy(update={"num_test_splines": tests})


class RotatingSettings(Settings):
    """The frame in which the stars are steady, when it turns or moves."""

    pattern_speed: float | None = None
    """Ω_p in km/s/kpc, positive along Galactic rotation; fitted with the gravity where not given."""
    translation: bool = False
    """Fit a velocity of the frame too."""
    center_kpc: tuple[float, float] = (0.0, 0.0)
    """x and y of the axis."""
    num_blocks: int = Field(default=20, ge=5)
    """Blocks of stars for the jackknife."""
    min_asymmetry: float = Field(default=0.02, ge=0)
    """A fitted Ω_p counts as known from this asymmetry on (see `RotatingFit.asymmetry`): a little is always
    there, since a ball around the Sun leaves its mark on every model."""
    min_strength: float = Field(default=4.0, gt=0)
    """… if the asymmetry's square is at least this many times its own error,"""
    max_error: float = Field(default=10.0, gt=0)
    """… and the error of Ω_p is at most this, in km/s/kpc."""


class BaryonSettings(Settings):
    """What is subtracted from the total density."""

    model: Literal["mckee2015", "potential", "none", "table"] = "mckee2015"
    """``mckee2015`` for the real Galaxy, ``potential`` for a mock, ``table`` for a file of one's own."""
    file: str = ""
    """TOML table of layers (`table` only), in the form of galray/gravity/data/mckee2015.toml."""
    potential: dict | None = None
    """`galray.potentials` description of the baryons (`potential` only)."""
    relative_error: float = Field(default=0.0, ge=0)
    """Relative uncertainty of the mass of a `potential` model."""

    @model_validator(mode="after")
    def _complete(self) -> BaryonSettings:
        if self.model == "table" and not self.file:
            raise ValueError("file: the model 'table' needs the path of a TOML table of layers")
        return self


class HaloSettings(Settings):
    """Where the dark matter density is averaged and what is fitted to it."""

    min_height_kpc: float = Field(default=0.5, ge=0)
    """|z| of the average begins here (the disc's baryons dominate below)."""
    max_height_kpc: float = Field(default=2.0, gt=0)
    """and ends here."""
    max_radius_offset_kpc: float = Field(default=0.3, ge=0)
    """|R − R0| of the average is at most this."""
    max_distance_y_kpc: float = Field(default=1.5, ge=0)
    """|arc| along the Solar circle is at most this."""
    profiles: tuple[ProfileName, ...] = ("nfw", "gnfw", "einasto")
    """Halo profiles that are fitted to the densities above `min_height_kpc`."""
    scale_radius_kpc: tuple[float, float] = (16.0, 0.5)
    """Prior of r_s: median in kpc, and the standard deviation of its natural logarithm (0 holds it). A ball
    of a few kpc sees one slope of the halo, not where it bends."""
    inner_slope: tuple[float, float] = (1.0, 0.5)
    """Prior of γ of the generalised NFW profile: mean and standard deviation (0 holds it)."""
    einasto_index: tuple[float, float] = (0.17, 0.3)
    """Prior of Einasto's α: median, and the standard deviation of its logarithm (0 holds it)."""
    flattening: tuple[float, float] = (1.0, 0.5)
    """Prior of the axis ratio q: median, and the standard deviation of its logarithm (0 holds it)."""

    @field_validator("scale_radius_kpc", "inner_slope", "einasto_index", "flattening")
    @classmethod
    def _prior(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if value[1] < 0:
            raise ValueError("the width of a prior cannot be negative")
        if info.field_name != "inner_slope" and value[0] <= 0:
            raise ValueError("the median of a prior must be above zero")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> HaloSettings:
        if self.max_height_kpc <= self.min_height_kpc:
            raise ValueError("max_height_kpc: must be above min_height_kpc")
        if not 0 <= self.inner_slope[0] < 2:
            raise ValueError("inner_slope: a halo's mean inner slope lies from 0 to below 2")
        return self


class GravitySettings(Settings):
    """From models of f to acceleration and mass."""

    moments: MomentsSettings = MomentsSettings()
    potential: PotentialSettings = PotentialSettings()
    least_squares: LeastSquaresSettings = LeastSquaresSettings()
    dust: DustSettings | None = None
    """Fit ε(x) with Φ to flows and scores; moments do so where `moments.selection` says so."""
    kernel: KernelSettings = KernelSettings()
    baryons: BaryonSettings = BaryonSettings()
    halo: HaloSettings = HaloSettings()
