"""Settings of steering: those that all methods share, and one section per method."""

import math
from dataclasses import dataclass, field

from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.runs.recipe import at_least, one_of, positive, require

METHODS = ("best_of_n", "fk", "dps")
RESAMPLING = ("systematic", "multinomial")
SCHEDULES = ("constant", "sigma", "tilt")
ESTIMATES = ("tweedie", "monte_carlo")


def require_window(name: str, window: list[int], lowest: int, may_be_empty: bool) -> None:
    """Raise InputError unless a window is [first, last], in order, from `lowest` on, or empty where it may be."""
    fits = lowest <= window[0] <= window[1] if len(window) == 2 else may_be_empty and not window
    rule = f"{name} must be [first, last] with {lowest} <= first <= last" + ", or empty" * may_be_empty
    require(fits, rule, window)


@dataclass
class BestOfN:
    particles: int = 4
    """Samples per prompt, of which the best is kept."""
    prune_at: int = 0
    """Number of steps after which only the best sample, by its value there, is continued; 0: all are finished."""

    def __post_init__(self):
        at_least("best_of_n.particles", self.particles, 1)
        at_least("best_of_n.prune_at", self.prune_at, 0)


@dataclass
class FeynmanKac:
    particles: int = 4
    """Samples per prompt, which are resampled; the best one at the end is kept."""
    proposals: int = 1
    """Draws from a particle's transition, of which the best is kept (M of Stitched Value Model, C.2)."""
    proposal_window: list[int] = field(default_factory=list)
    """[first, last] number of completed steps with several proposals; empty: the first 40% of the steps."""
    temperature: float = 10.0
    """Lambda: particles are resampled with weights exp(lambda (V(new) - V(old))). 0 is plain sampling."""
    every: int = 4
    """Steps between resamplings."""
    window: list[int] = field(default_factory=lambda: [8, 32])
    """[first, last] number of completed steps at which particles are resampled."""
    resampling: str = "systematic"
    """systematic (least noise; equal weights leave the particles unchanged) or multinomial."""
    least_ess: float = 0.0
    """Share of the particles, below 1, that the effective sample size of a resampling keeps: where the weights would
    leave less, lambda is lowered for this prompt and resampling, and the rest of the weights counts in the next one or
    in the final weights. More of the first particles have descendants at the end, at a lower reward. 0: off."""

    def __post_init__(self):
        at_least("fk.particles", self.particles, 1)
        at_least("fk.proposals", self.proposals, 1)
        at_least("fk.temperature", self.temperature, 0)
        at_least("fk.every", self.every, 1)
        require_window("fk.window", self.window, 1, may_be_empty=False)
        require_window("fk.proposal_window", self.proposal_window, 1, may_be_empty=True)
        one_of("fk.resampling", self.resampling, RESAMPLING)
        require(0 <= self.least_ess < 1, "fk.least_ess must be in [0, 1)", self.least_ess)

    def proposing(self, steps: int) -> range:
        """Return the numbers of completed steps, of `steps`, with several proposals."""
        first, last = self.proposal_window or (1, math.ceil(0.4 * steps))
        return range(first, last + 1) if self.proposals > 1 else range(0)

    def resampled(self) -> range:
        """Return the numbers of completed steps at which particles are resampled."""
        return range(self.window[0], self.window[1] + 1, self.every)


@dataclass
class Guidance:
    strength: float = 1.0
    """Scale c of the term c_t grad V that is subtracted from the velocity; 0 is plain sampling."""
    schedule: str = "sigma"
    """c_t at level t: constant (c), sigma (c t) or tilt (c t / (1 - t), which samples the density times exp(c V) if V
    is exact; at t = 1, the second level's value is used)."""
    window: list[int] = field(default_factory=list)
    """[first, last] step with guidance, counted from 0; empty: all."""

    def __post_init__(self):
        require(math.isfinite(self.strength), "dps.strength must be finite", self.strength)
        one_of("dps.schedule", self.schedule, SCHEDULES)
        require_window("dps.window", self.window, 0, may_be_empty=True)


@dataclass
class Settings:
    """How prompts are sampled and steered; each method reads its own section."""

    steps: int = 40
    """Solver steps."""
    guidance: float = 4.5
    """Scale of classifier-free guidance, 1 for none; or the scale that a guidance-distilled model reads as an input."""
    stochasticity: float = 1.0
    """Noise of the transitions: 0 for none (Euler steps), 1 for the time reversal, 2 for twice its variance (as printed
    in Stitched Value Model, appendix A)."""
    order: int = 1
    """1: each transition takes the clean latent predicted in this step for constant. 2: it extrapolates from the
    prediction of the step before, without further network calls, and keeps more of the data's spread where steps are
    few: for a normal distribution of standard deviation 0.5 and stochasticity 1, 0.81 of it instead of 0.58 in 8 steps,
    1.01 instead of 0.86 in 40. The first two steps and the last one are of first order, and the extrapolation is
    bounded: without the bound, few steps would have too much spread. Much is still lost where the data are narrow. Its
    relatives are DPM-Solver++(2M) for SDEs (arXiv 2211.01095) and arXiv 2605.23522."""
    micro_batch: int | None = None
    """Latents that a network processes at once, whatever the number of particles. null: the largest power of two up to
    16 that is planned to fit a GPU's free memory; 16 on a CPU."""
    seed: int = 0
    """Addresses the noise, together with the positions of prompt and particle."""
    best_of_n: BestOfN = field(default_factory=BestOfN)
    fk: FeynmanKac = field(default_factory=FeynmanKac)
    dps: Guidance = field(default_factory=Guidance)

    def __post_init__(self):
        at_least("steps", self.steps, 2)
        require(1 <= self.guidance < 100, "guidance must be from 1 (none) to 100", self.guidance)
        require(0 <= self.stochasticity <= 10, "stochasticity must be in [0, 10]", self.stochasticity)
        require(self.order in (1, 2), "order must be 1 or 2", self.order)
        if self.micro_batch is not None:
            at_least("micro_batch", self.micro_batch, 1)
        at_least("seed", self.seed, 0)

    def require_method(self, method: str) -> None:
        """Raise InputError for an unknown method, or if its section does not fit the number of steps."""
        one_of("the method", method, METHODS)
        if method == "fk":
            last = self.fk.window[1]
            require(last <= self.steps, f"fk.window must end within the schedule's {self.steps} steps", self.fk.window)
            proposing = self.fk.proposal_window
            require(
                not proposing or proposing[1] < self.steps,
                f"fk.proposal_window must end before the last of {self.steps} steps, which draws no noise",
                proposing,
            )
            require(
                self.stochasticity > 0 or self.fk.proposals == 1,
                "fk.proposals must be 1 where stochasticity is 0: all proposals would be equal",
                self.fk.proposals,
            )
        elif method == "best_of_n":
            at = self.best_of_n.prune_at
            require(at < self.steps, f"best_of_n.prune_at must lie within the schedule's {self.steps} steps", at)
        elif self.dps.window:
            require(
                self.dps.window[1] < self.steps,
                f"dps.window must lie within the schedule, steps 0 to {self.steps - 1}",
                self.dps.window,
            )

    def particles(self, method: str) -> int:
        """Return the number of particles per prompt."""
        return {"best_of_n": self.best_of_n.particles, "fk": self.fk.particles, "dps": 1}[method]

    def proposals(self, method: str) -> int:
        """Return the largest number of candidates per particle."""
        return self.fk.proposals if method == "fk" else 1


@dataclass
class SteeringRecipe(Settings):
    """Steering by named rewards; `base:` names a parent file, relative to it, that is read first."""

    rewards: list[RewardRecipe] = field(default_factory=list)
    """A weighted sum of stitched value models (kind value), which score noisy latents, or of rewards of images."""
    estimate: str = "tweedie"
    """How rewards of images score a noisy latent: tweedie (the image of the denoised latent) or monte_carlo (images of
    rollouts)."""
    rollouts: int = 4
    """Rollouts per Monte Carlo estimate."""

    @property
    def code(self) -> list[str]:
        """Functions and classes that the recipe runs, as package.module:name."""
        return [reward.custom for reward in self.rewards if reward.custom]

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.rewards), "rewards must list at least one reward", self.rewards)
        names = [reward.name for reward in self.rewards]
        require(len(set(names)) == len(names), "every reward needs a unique name", names)
        kinds = {reward.kind == "value" for reward in self.rewards}
        require(len(kinds) == 1, "rewards of kind value and rewards of images cannot be mixed", names)
        one_of("estimate", self.estimate, ESTIMATES)
        positive("rollouts", self.rollouts)

    def require_method(self, method: str) -> None:
        """Check as `Settings` does, and that dps has a gradient: Monte Carlo estimates have none."""
        super().require_method(method)
        require(
            method != "dps" or self.estimate == "tweedie",
            "dps needs a gradient: estimate must be tweedie, or rewards of kind value",
            self.estimate,
        )
