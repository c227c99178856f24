"""A Plan: one mechanism as plain numbers, one choice per stage, no data in it.

From it come, and only from it, the event that is accounted for, the step that runs, and the words of the certificate.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dp_accounting import DpEvent, NoOpDpEvent

from privgrad.errors import PrivgradError, RefusedError, check_count, check_number, choice, nearest
from privgrad.files import digest
from privgrad.mechanism.clipping import FlatClipping
from privgrad.mechanism.disclosure import DISCLOSURES, check_disclosures
from privgrad.mechanism.kinds import KINDS, PROTOCOLS, kind_of, plain, stage_from_json, stage_to_json, told_first
from privgrad.mechanism.mixing import CALIBRATE
from privgrad.mechanism.noise import GaussianNoise
from privgrad.mechanism.sampling import (
    ShuffledBatches,
)
from privgrad.mechanism.stage import Clipping, Compression, Groups, Mixing, Noise, Sampling, Statistics, Thresholds
from privgrad.privacy import accounting
from privgrad.privacy.accounting import MOST_STEPS, Precision
from privgrad.privacy.adjacency import Adjacency, Example, Protects, User
from privgrad.privacy.calibration import calibrate, calibrate_width
from privgrad.privacy.certificate import PlanFacts
from privgrad.privacy.events import Accountant, Mixed, Sampled, compose, relation, step_event
from privgrad.privacy.ledger import Terms
from privgrad.privacy.sensitivity import Bound, presence_distance


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One differentially private training mechanism.

    steps: how many steps may be charged. Steps lost in a crash count, so that the budget holds whatever happens.
    delta: the delta at which epsilon is stated. disclose: names of un-noised quantities that the user asks for
    (`mechanism.disclosure`); the guarantee does not cover them, and the certificate says so.

    Guarantee: running the plan is (epsilon(delta), delta)-DP for every delta, for the unit `protects` and the adjacency.

    Raises:
        PrivgradError: a stage of the wrong type or with wrong numbers.
        RefusedError: a combination without a proof.
    """

    sampling: Sampling
    steps: int
    noise: Noise = GaussianNoise()
    clipping: Clipping = FlatClipping()
    protects: Protects = Example()
    groups: Groups | None = None
    compression: Compression | None = None
    thresholds: Thresholds | None = None
    mixing: Mixing | None = None
    statistics: Statistics | None = None
    adjacency: Adjacency = Adjacency.ZERO_OUT
    accountant: Accountant = Accountant.PLD
    delta: float = 1e-5
    disclose: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count("steps", self.steps, at_most=MOST_STEPS)
        check_number("delta", self.delta, above=0, below=1)
        object.__setattr__(self, "adjacency", choice("adjacency", Adjacency, self.adjacency))
        object.__setattr__(self, "accountant", choice("accountant", Accountant, self.accountant))
        object.__setattr__(self, "disclose", check_disclosures(self.disclose))
        for name, protocol in PROTOCOLS.items():
            value = getattr(self, name)
            optional = value is None and name not in ("sampling", "clipping", "noise")
            if not optional and not isinstance(value, protocol):
                raise PrivgradError(f"{name} is {value!r}; expected a {protocol.__name__} stage")
        if not isinstance(self.protects, Protects):
            raise PrivgradError(f"protects is {self.protects!r}; expected Example() or User(key)")
        size = self.sampling.normaliser
        if self.groups is not None and size is not None and self.groups.count > size:
            raise PrivgradError(
                f"groups.count is {self.groups.count}, and a batch has {size:g} units on average; most groups would be "
                "empty: take at most as many groups, or clip each unit (no groups)"
            )
        self.sampling.check(self.adjacency)
        self._check_order()
        if self.mixing is not None:
            self.mixing.check(self)
        if self.sampling.sampled is not None:
            relation(self.sampling.sampled.sampler, self.adjacency, self.accountant)
            _ = self.words  # the certificate's: a stage without them is found now, and not after the training

    def _check_order(self) -> None:
        """Batches in a public order say who is in which: a unit that takes another's place must take it in the order, too."""
        if (
            isinstance(self.sampling, ShuffledBatches)
            and self.adjacency is Adjacency.REPLACE_ONE
            and isinstance(self.protects, User)
        ):
            raise RefusedError(
                "shuffled batches of users under replace_one: users are numbered by their keys, so that one who comes instead of "
                "another moves those between them to other batches; use Poisson sampling, or adjacency zero_out"
            )

    @property
    def divisor(self) -> float:
        """The constant that the noised sum is divided by: the expected batch size, or the number of groups."""
        if self.groups is not None:
            return float(self.groups.count)
        if self.sampling.normaliser is None:
            raise PrivgradError(
                "sampling.divisor (the constant that sums are divided by) is not known; give it, or a data set"
            )
        return float(self.sampling.normaliser)

    @property
    def sampled(self) -> Sampled:
        """The sampler as the accountant knows it."""
        if self.sampling.sampled is None:
            raise PrivgradError("sampling.dataset_size is not known; give it, or a data set")
        return self.sampling.sampled

    def step_event(self, step: int = 1) -> DpEvent:
        """The event of step 1, 2, ..., everything that it releases included."""
        if self.noise.multiplier is None:
            raise PrivgradError("noise.multiplier is not set; give it, or calibrate the plan to an epsilon")
        if self.sampling.charges(step) == self.sampling.charges(step - 1):
            return NoOpDpEvent()
        return step_event(
            self.sampled,
            self.adjacency,
            self.accountant,
            multiplier=self.noise.multiplier,
            grouped=self.groups is not None,
            mixed=self._mixed(),
        )

    def _mixed(self) -> Mixed | None:
        """The uniform noise of mixing on the clipped sum, in units of what one record can move it by."""
        radius = getattr(self.clipping, "radius", None)
        if self.mixing is None or radius is None or self.mixing.width_ratio == 0:
            return None  # without a uniform of known width, mixing is post-processing of the Gaussian
        if self.mixing.width_ratio == CALIBRATE:
            raise PrivgradError("mixing.width_ratio is not set; give it, or calibrate the plan to an epsilon")
        distance = presence_distance(Bound.ball(radius), grouped=self.groups is not None)
        width = self.mixing.width_ratio * self.divisor / distance
        return Mixed(width, float(getattr(self.clipping, "p", 1.0)))

    def events(self, steps: int | None = None) -> Counter[DpEvent]:
        """The events of the first `steps` steps (all of them by default), and how often each is charged."""
        count = self.steps if steps is None else steps
        charged = self.sampling.charges(count)
        return +Counter({self.step_event(): charged, NoOpDpEvent(): count - charged})

    def event(self, steps: int | None = None) -> DpEvent:
        """The event of `steps` steps (all of them by default) together."""
        return compose(self.events(steps))

    def epsilon(
        self, delta: float | None = None, *, steps: int | None = None, precision: Precision = Precision.FINE
    ) -> float:
        """An upper bound on the epsilon of `steps` steps (all by default) at `delta` (the plan's by default)."""
        rules = relation(self.sampled.sampler, self.adjacency, self.accountant)
        at = self.delta if delta is None else delta
        return accounting.epsilon(self.event(steps), at, rules, self.accountant, precision)

    def calibrate(self, epsilon: float, delta: float | None = None) -> Plan:
        """This plan with the smallest noise multiplier that keeps epsilon at `delta` within the target, never above it.

        Where mixing.width_ratio is "calibrate": with the smallest width instead, under the multiplier that the plan has.
        """
        plan = self if delta is None else dataclasses.replace(self, delta=delta)
        if not plan.calibrates_width:
            return plan.with_multiplier(
                calibrate(lambda z, grid: plan.with_multiplier(z).epsilon(precision=grid), epsilon)
            )
        if not plan.noise.multiplier:
            raise PrivgradError(
                "mixing.width_ratio is 'calibrate', and noise.multiplier is not given or 0; the width follows from epsilon and "
                "the noise: give noise.multiplier"
            )
        one = plan.with_width(1.0)._mixed()
        assert one is not None
        unit = plan.noise.multiplier / one.width
        return plan.with_width(
            unit * calibrate_width(lambda width, grid: plan.with_width(unit * width).epsilon(precision=grid), epsilon)
        )

    @property
    def calibrates_width(self) -> bool:
        """True where it is the width of mixing that follows from epsilon, and not the noise multiplier."""
        return self.mixing is not None and self.mixing.width_ratio == CALIBRATE

    @property
    def is_calibrated(self) -> bool:
        """True where no number is left that follows from epsilon."""
        return self.noise.multiplier is not None and not self.calibrates_width

    def check_public(self, given: bool) -> None:
        """Refuse to run without public data where a stage works with some."""
        for name in KINDS:
            stage = getattr(self, name)
            if getattr(stage, "needs_public", False) and not given:
                raise RefusedError(
                    f"plan.{name} of kind {stage.kind!r} needs public data, and none is given; give public=DATA (Python) or "
                    f"[public] source (configuration), or choose another kind of {name}"
                )

    def with_multiplier(self, multiplier: float) -> Plan:
        """This plan with another noise multiplier."""
        noise: Any = self.noise
        return dataclasses.replace(self, noise=dataclasses.replace(noise, multiplier=multiplier))

    def with_width(self, width_ratio: float) -> Plan:
        """This plan with another width of mixing."""
        mixing: Any = self.mixing
        return dataclasses.replace(self, mixing=dataclasses.replace(mixing, width_ratio=width_ratio))

    def with_seed(self, seed: int | None) -> Plan:
        """This plan with its seed put back, which a stored plan does not hold."""
        noise: Any = self.noise
        return self if seed is None else dataclasses.replace(self, noise=dataclasses.replace(noise, insecure_seed=seed))

    def for_dataset(self, units: int) -> Plan:
        """This plan with the number of units of its data set filled in, where the plan needs it; another number is refused."""
        return dataclasses.replace(self, sampling=self.sampling.for_dataset(units, self.adjacency))

    @property
    def words(self) -> dict[str, str]:
        """What each stage does, for the certificate."""
        unit = self.protects.unit
        stages = {name: getattr(self, name) for name in KINDS}
        if isinstance(self.protects, Example):
            del stages["protects"]
        return {
            name: told_first(name, chosen) + _words(name, chosen).replace("{unit}", unit)
            for name, chosen in stages.items()
            if chosen is not None
        }

    def facts(self) -> PlanFacts:
        """What the certificate says of this plan."""
        return PlanFacts(
            plan=self.to_json(),
            words=self.words,
            unit=self.protects.unit,
            noise_multiplier=float(self.noise.multiplier or 0.0),
            seeded=self.noise.insecure_seed is not None,
            steps=self.steps,
            own=tuple(kind_of(name, stage) for name in KINDS if told_first(name, stage := getattr(self, name))),
            disclosed=tuple(DISCLOSURES[name].replace("{unit}", self.protects.unit) for name in self.disclose),
        )

    def terms(self) -> Terms:
        """The first line of this plan's ledger. A plan whose epsilon could not be computed in the end is refused here."""
        accounting.check_composable(self.sampling.charges(self.steps), self.accountant)
        return Terms(self.digest(), self.sampled.sampler, self.adjacency, self.accountant, self.delta)

    def digest(self) -> str:
        """SHA-256 of the plan's JSON: two plans are the same mechanism exactly if their digests are equal."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The plan as plain numbers and names; `from_json` reads it back."""
        content: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in KINDS:
                content[field.name] = None if value is None else stage_to_json(field.name, value)
            else:
                content[field.name] = plain(field, value)
        return content

    @staticmethod
    def from_json(data: Mapping[str, Any], *, own: bool = False) -> Plan:
        """The plan of a dictionary made by `to_json`, or of the same keys from a configuration file. own: see `stage_class`."""
        known = {field.name for field in dataclasses.fields(Plan)}
        values: dict[str, Any] = {}
        for key, value in data.items():
            if key not in known:
                raise PrivgradError(f"plan.{key} is an unknown key; {nearest(key, known)}")
            values[key] = stage_from_json(key, value, own=own) if key in KINDS and value is not None else value
        try:
            return Plan(**values)
        except TypeError as error:
            raise PrivgradError(f"the plan is not complete: {error}") from error


def _words(slot: str, stage: Any) -> str:
    try:
        words = stage.words
    except (AttributeError, NotImplementedError):
        words = None
    if not isinstance(words, str) or not words.strip():
        raise PrivgradError(
            f"{type(stage).__name__} ({slot}) does not say what it does; give it a property `words`, a sentence for the "
            "certificate"
        )
    return words
