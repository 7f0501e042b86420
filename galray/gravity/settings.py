"""The [gravity] section of a configuration: inversions, smoothing kernel, baryons, averages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from galray.settings import Settings

__all__ = [
    "BaryonSettings",
    "DustSettings",
    "GravitySettings",
    "HaloSettings",
    "KernelSettings",
    "LeastSquaresSettings",
    "MomentsSettings",
    "PotentialSettings",
    "ProfileName",
]

ProfileName = Literal["nfw", "gnfw", "einasto"]


def _check_concentration(value: tuple[float, ...], dimension: int) -> None:
    if value and (len(value) != dimension or min(value) < 0 or max(value) > 6):
        raise ValueError(f"concentration: give {dimension} numbers from 0 to 6")


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


class MomentsSettings(Settings):
    """The weak-form moment estimator: splines of the potential, test functions, penalty."""

    basis: Literal["Rz", "xyz", "Rz+xyz"] = "Rz"
    """Splines in (R, z), an axially symmetric potential; in (x, y, z), which assumes no symmetry; or both
    side by side, the (x, y, z) part shrunk towards none by a penalty whose strength the data choose."""
    num_potential_splines: tuple[int, ...] = ()
    """Splines of Φ along each coordinate; () takes (8, 15) for Rz and Rz+xyz, and (7, 7, 9) for xyz. An odd
    number puts a break in the middle, where a Galaxy is sharpest; even numbers do much worse there."""
    num_departure_splines: tuple[int, ...] = ()
    """Splines of the (x, y, z) part of Rz+xyz along each coordinate; () takes (7, 7, 7)."""
    num_test_splines: tuple[int, ...] = ()
    """Test functions along each coordinate; () takes (10, 23) for Rz and Rz+xyz, and (8, 8, 11) for xyz.
    Where a selection is solved for it takes five sixths of the splines of Φ: what tells Φ from ε is little,
    and more moments add more noise to it than they tell."""
    num_departure_tests: tuple[int, ...] = ()
    """Test functions in (x, y, z) of Rz+xyz along each coordinate; () takes (7, 7, 9)."""
    velocity_functions: tuple[str, ...] = ()
    """Functions of velocity that multiply the test functions: products such as "v_R v_z", or "1"; () takes
    the first moments of the basis, and where a selection is solved for those up to order 3, in (R, z) the odd
    ones. The (x, y, z) part of Rz+xyz always takes v_x, v_y and v_z, and "1" where a pattern speed is
    fitted."""
    velocity_window: float = Field(default=80.0, gt=0)
    """s in km/s of the factor exp(−v_z²/2s²) of all functions of velocity: hot stars, which hold most of the
    noise, then count little. Take it well above the dispersion of what you study: far above, it leaves the
    functions as they are. On disc mocks of 20,000 to a million stars 80 km/s halved the error of a_z."""
    concentration: tuple[float, ...] = ()
    """β per coordinate: spline cells shrink towards the plane z = 0, and along x and y towards the centre
    (break points ∝ sinh(βt)); 0 gives equal cells; () takes (0, 2) for Rz and Rz+xyz, and (0, 0, 2) for
    xyz."""
    window: float = Field(default=0.5, ge=0, lt=1)
    """The window on |x − centre| is 1 up to this fraction of the radius and falls to 0 at the border."""
    north_south: bool = False
    """Force Φ(z) = Φ(−z)."""
    penalty: float | Literal["cv", "cv_1se", "cp", "evidence"] = "cv"
    """Strength of the third-difference penalty, or how to choose it: cross-validation over blocks, the
    strongest that it does not tell from its best (one standard error), Mallows' C_p, or the marginal
    likelihood of the moments."""
    penalty_steps: int = Field(default=7, ge=2, le=30)
    """Strengths tried in the coarse scan when the penalty is chosen."""
    min_stars: int = Field(default=30, ge=2)
    """Test functions that rest on fewer stars are left out."""
    noise: Literal["ignore", "deconvolve"] = "ignore"
    """``ignore``: gravity of the stars as measured; ``deconvolve``: each moment less what the stars' errors
    add to it to first order in their covariances, −½ C:∇∇g, for some four times the cost."""
    selection: Literal["known", "shared", "each"] = "known"
    """Solve for the selection efficiency ε(x) too: one of all tracer populations, or one of each. ``known``
    takes it as constant, or as given with the stars."""
    selection_basis: Literal["", "Rz", "xyz"] = ""
    """Coordinates of log ε; "" takes those of the velocity functions. Dust has no symmetry of Φ's."""
    num_selection_splines: tuple[int, ...] = ()
    """Splines of log ε along each coordinate; () takes (6, 9) in (R, z) and (5, 5, 7) in (x, y, z)."""
    selection_concentration: tuple[float, ...] = ()
    """β per coordinate of the cells of log ε; () takes that of Φ, or (0, 0, 2) in (x, y, z)."""
    selection_amplitude: float = Field(default=2.0, gt=0)
    """Standard deviation of log ε beforehand: what keeps it finite where the stars cannot tell it from Φ."""
    selection_monotone: bool = False
    """Let ε nowhere grow with the distance from the centre of the ball, as behind dust."""
    selection_cells_kpc: float | None = Field(default=None, gt=0)
    """Side of cells in which stars are counted first: weighed so that the counts are axially symmetric, they
    leave an ε(R, z) to solve for, and a map of ε in these cells follows. None: stars are not weighed."""
    pattern_speed: float | Literal["fit"] = 0.0
    """Ω about the Galactic centre, in km/s/kpc and positive along Galactic rotation, of the frame in which
    the stars are stationary; ``fit`` measures it, where the stars are not so axially symmetric that it
    cannot be known."""
    positive_mass: bool = False
    """Force ρ ≥ 0 at the nodes of a grid over the ball."""
    jackknife: Literal["shards", "sky"] = "shards"
    """Blocks of the jackknife: the shards, which are random parts of the stars, or smooth patches of sky."""
    num_patches: int = Field(default=12, ge=3, le=200)
    """Patches of the jackknife over the sky."""
    num_blocks: int = Field(default=40, ge=3, le=1000)
    """Shards are added up to at most this many blocks, for cross-validation and jackknife."""

    @model_validator(mode="after")
    def _sizes(self) -> MomentsSettings:
        plane = 3 if self.basis == "xyz" else 2
        seen = 3 if self.selection_family == "xyz" else 2
        for name, dimension in (
            ("num_potential_splines", plane),
            ("num_test_splines", plane),
            ("num_selection_splines", seen),
            ("num_departure_splines", 3),
            ("num_departure_tests", 3),
        ):
            sizes = getattr(self, name)
            if sizes and (len(sizes) != dimension or min(sizes) < 4):
                raise ValueError(f"{name}: the {self.basis} basis takes {dimension} numbers of at least 4")
        _check_concentration(self.concentration, plane)
        _check_concentration(self.selection_concentration, seen)
        if not isinstance(self.penalty, str) and not self.penalty >= 0:
            raise ValueError("penalty: a strength cannot be negative")
        for name in self.velocity_functions:
            from galray.gravity.velocity_functions import check_function

            try:
                check_function(name, self.family)
            except ValueError as error:
                raise ValueError(f"velocity_functions: {error}") from None
        if self.basis == "Rz" and self.pattern_speed != 0.0:
            raise ValueError(
                "pattern_speed: an axially symmetric potential looks the same in every rotating frame; "
                "set basis = 'xyz' or 'Rz+xyz'"
            )
        if self.selection_cells_kpc and (self.selection == "known" or self.selection_family != "Rz"):
            raise ValueError("selection_cells_kpc: goes with selection = 'shared' in (R, z)")
        if self.pattern_speed == "fit" and self.selection != "known":
            raise ValueError("pattern_speed: 'fit' and an unknown selection are not solved for together")
        if self.noise != "ignore" and self.jackknife == "sky":
            raise ValueError("noise: 'deconvolve' goes with jackknife = 'shards'")
        if self.noise != "ignore" and (
            self.basis == "Rz+xyz" or self.selection != "known" or self.pattern_speed
        ):
            raise ValueError(
                "noise: 'deconvolve' goes with the Rz or xyz basis, a known selection and no pattern speed"
            )
        return self

    @property
    def family(self) -> Literal["Rz", "xyz"]:
        """The components of velocity of `functions`."""
        return "xyz" if self.basis == "xyz" else "Rz"

    @property
    def selection_family(self) -> Literal["Rz", "xyz"]:
        """The coordinates of log ε, default filled in."""
        return self.selection_basis or self.family

    @property
    def potential_splines(self) -> tuple[int, ...]:
        """The number of potential splines along each coordinate, defaults filled in."""
        return self.num_potential_splines or ((7, 7, 9) if self.basis == "xyz" else (8, 15))

    @property
    def test_splines(self) -> tuple[int, ...]:
        """The number of test functions along each coordinate, defaults filled in."""
        if self.num_test_splines:
            return self.num_test_splines
        if self.selection != "known":
            return tuple(max(n - n // 6, 4) for n in self.potential_splines)
        return (8, 8, 11) if self.basis == "xyz" else (10, 23)

    @property
    def departure_splines(self) -> tuple[int, ...]:
        """The number of splines of the (x, y, z) part of Rz+xyz, defaults filled in."""
        return self.num_departure_splines or (7, 7, 7)

    @property
    def departure_tests(self) -> tuple[int, ...]:
        """The number of test functions of the (x, y, z) part of Rz+xyz, defaults filled in."""
        return self.num_departure_tests or (7, 7, 9)

    @property
    def selection_splines(self) -> tuple[int, ...]:
        """The number of splines of log ε along each coordinate, defaults filled in."""
        return self.num_selection_splines or ((5, 5, 7) if self.selection_family == "xyz" else (6, 9))

    @property
    def selection_concentrations(self) -> tuple[float, ...]:
        """The concentration of log ε along each coordinate, defaults filled in."""
        if self.selection_concentration:
            return self.selection_concentration
        return (0.0, 0.0, 2.0) if self.selection_family == "xyz" else self.concentrations

    @property
    def concentrations(self) -> tuple[float, ...]:
        """The concentration along each coordinate, defaults filled in."""
        return self.concentration or ((0.0, 0.0, 2.0) if self.basis == "xyz" else (0.0, 2.0))

    @property
    def functions(self) -> tuple[str, ...]:
        """The velocity functions, defaults filled in: more orders where a selection is solved for."""
        from galray.gravity.velocity_functions import up_to_order

        if self.velocity_functions:
            return self.velocity_functions
        if self.selection != "known":
            names = up_to_order(self.family, 3)
            if self.family == "Rz":
                # The even ones have no coefficients where v_R and v_z are as often up as down.
                return tuple(n for n in names if (n.count("v_R") + n.count("v_z")) % 2)
            return names
        if self.family == "Rz":
            return ("v_R", "v_z")
        return ("1", "v_x", "v_y", "v_z") if self.pattern_speed == "fit" else ("v_x", "v_y", "v_z")


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
        _check_concentration(self.concentration, dimension)
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError("hidden: at least one layer of at least one unit")
        if self.basis == "spline" and self.base == "masses":
            raise ValueError("base: masses without a network are basis = 'masses'")
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
