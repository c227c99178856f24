"""The comparisons of the coupling detector, on one pair of batches with one set of random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

from torch import Tensor

from privgrad.errors import PrivgradError, RefusedError
from privgrad.gradients.contract import Tree
from privgrad.nn.blame import View, culprits_backward, culprits_forward, reaches_others
from privgrad.nn.finding import ALONE, GRADIENT, LOSS, OUTPUT, Finding, counted, in_either, in_loss, in_module, kept
from privgrad.nn.state import Slot, same
from privgrad.nn.subject import (
    ROWS,
    Draw,
    Run,
    Subject,
    differ,
    keep_row,
    largest_of,
    only_row,
    reason,
    scaled,
    zero_integers,
)


class NotFiniteError(PrivgradError):
    """A loss that is NaN or infinite on an ordinary record."""


class Inspection:
    """A batch, other rows to put in the place of its rows, and what came out for the batch itself.

    Raises:
        NotFiniteError: losses that are not finite.
        PrivgradError: losses that are not one number per row. Whatever else the model or the loss function raises.
    """

    def __init__(self, subject: Subject, draw: Draw, pair: tuple[Tree, Tree]) -> None:
        self.subject, self.draw = subject, draw
        self.batch, self.others = pair
        self.reference = subject.run(self.batch, draw)
        self.losses = self.reference.losses.detach()
        self.scale = largest_of([self.losses])
        self.taken_up: set[Slot] = set()
        self.counted: set[Slot] = set()
        if not bool(self.losses.isfinite().all()):
            raise NotFiniteError("the losses are not finite (NaN or infinity)")

    def thoroughly(self, factor: float) -> list[Finding]:
        """Outputs, gradients, the batch of one, and all that is remembered; extreme rows are `factor` times as large."""
        gradients = [self.subject.gradient(self.reference, row) for row in range(ROWS)]
        if not any(bool(by_parameters.any()) for by_parameters, _ in gradients):
            raise PrivgradError(
                "the losses do not depend on any trainable parameter; is a part of the model under no_grad, detached, or frozen?"
            )
        self._check_repeats()
        found = self._outputs_and_gradients(gradients)
        if self.reference.inputs:
            found = found or self._outputs(scaled(self.others, factor))
        found = found or self._alone([by_parameters for by_parameters, _ in gradients])
        self._remembered()
        return [*found, *self._taken_up()]

    def quickly(self, factor: float) -> list[Finding]:
        """Outputs and buffers, with other rows `factor` times as large (NaN: made NaN) where the model can take them."""
        found = self._outputs(scaled(self.others, factor))
        return [*found, *self._taken_up()]

    def _check_repeats(self) -> None:
        again = self.subject.run(self.batch, self.draw)
        if differ(self.losses, again.losses.detach(), self.subject.same_shape):
            raise RefusedError(
                "the same batch with the same random numbers gives other losses: the model or the loss function keeps something "
                "outside its modules, or draws random numbers of its own, so that its records cannot be shown to be independent; "
                "keep state in the modules and draw from torch's generator"
            )

    def _outputs_and_gradients(self, gradients: list[tuple[Tensor, list[Tensor]]]) -> list[Finding]:
        coupled: Tree = None
        for row, (by_parameters, by_inputs) in enumerate(gradients):
            changed = keep_row(self.others, self.batch, row)
            run = self._run(changed)
            if self._moved(run, row):
                return self._named_by(changed, row)
            leaks = any(reaches_others(gradient, row, self.subject.precision) for gradient in by_inputs)
            # By the scale of the largest: a bias before a normalisation has a gradient of nothing but rounding.
            scale = largest_of([by_parameters])
            if leaks or differ(by_parameters, self.subject.gradient(run, row)[0], self.subject.same_shape, scale):
                coupled = coupled or (changed, row)
        if coupled is None:
            return []
        try:
            names = culprits_backward(self.subject, self.draw, self.batch, *coupled)
        except Exception:  # what is found stays found where no name can be had
            names = []
        return [in_module(self.subject.modules, name, GRADIENT) for name in names] or [in_either(GRADIENT)]

    def _outputs(self, extreme: Tree) -> list[Finding]:
        for row in range(ROWS):
            changed = keep_row(extreme, self.batch, row)
            try:
                run = self._run(changed)
            except Exception:  # a model may refuse extreme values; then ordinary ones must do
                changed = keep_row(self.others, self.batch, row)
                run = self._run(changed)
            if self._moved(run, row):
                return self._named_by(changed, row)
        return []

    def _alone(self, gradients: list[Tensor]) -> list[Finding]:
        """A batch of one against the batch."""
        if not self.reference.equal:
            return []
        tolerance = self.subject.other_shape
        for row in (0, ROWS - 1):
            alone = only_row(self.batch, row)
            try:
                run = self._run(alone)
            except PrivgradError:
                raise
            except Exception as error:
                raise PrivgradError(
                    f"loss_fn cannot take a batch of one record, which Poisson sampling may draw: {reason(error)}"
                ) from error
            if differ(self.losses[row], run.losses[0].detach(), tolerance, self.scale):
                good, bad = View(alone, 1, 0), View(self.batch, ROWS, row)
                return self._named(good, bad, tolerance, ALONE, ALONE)
            # Kernels round by shape, and at a kink that is another slope: a coupling shows on other rows as well.
            if self._slopes_differ(gradients[row], run) and self._slopes_differ_on_others(row):
                return [in_either(ALONE)]
        return []

    def _slopes_differ(self, in_batch: Tensor, alone: Run) -> bool:
        return differ(in_batch, self.subject.gradient(alone, 0)[0], self.subject.other_shape, largest_of([in_batch]))

    def _slopes_differ_on_others(self, row: int) -> bool:
        in_batch, alone = self._run(self.others), self._run(only_row(self.others, row))
        return self._slopes_differ(self.subject.gradient(in_batch, row)[0], alone)

    def _remembered(self) -> None:
        """What only shows when other entries of a vocabulary occur, or over two batches.

        A plain attribute counts if it still differs after a second, equal batch: then it remembers the first one. (One that holds
        what the last batch left, such as attention weights to look at, is overwritten, and never published.)
        """
        if not self.reference.changes:
            return
        with contextlib.suppress(Exception):  # zero may be no valid value
            self._run(zero_integers(self.batch))
        left = []
        for first in (self.batch, self.others, only_row(self.batch, 0)):
            with contextlib.suppress(Exception):  # a layer that couples may not take one record
                self.subject.run(first, self.draw)
            after = self.subject.run(self.batch, self.draw, restore=False)
            left.append(after.changes)
            if first is self.batch and differ(self.losses, after.losses.detach(), self.subject.same_shape):
                # Attributes are put back after each pass, tensors without a word; a number is a schedule that would stand still.
                moved = _different(self.reference.changes, after.changes, registered=False)
                self.counted = {slot for slot in moved if not isinstance(after.changes.get(slot), Tensor)}
        for other in left[1:]:
            self.taken_up |= _different(left[0], other, registered=False)

    def _run(self, batch: Tree) -> Run:
        """A run that is compared with the reference: in the buffers at once, in the losses by the caller."""
        run = self.subject.run(batch, self.draw)
        self.taken_up |= _different(self.reference.changes, run.changes, registered=True)
        return run

    def _moved(self, run: Run, row: int) -> bool:
        return differ(self.losses[row], run.losses[row].detach(), self.subject.same_shape, self.scale)

    def _named_by(self, changed: Tree, row: int) -> list[Finding]:
        good, bad = View(self.batch, ROWS, row), View(changed, ROWS, row)
        return self._named(good, bad, self.subject.same_shape, OUTPUT, LOSS)

    def _named(self, good: View, bad: View, tolerance: float, output: str, loss: str) -> list[Finding]:
        try:
            blame = culprits_forward(self.subject, self.draw, good, bad, tolerance)
        except Exception:  # what is found stays found where no name can be had
            return [in_either(loss)]
        found = [in_module(self.subject.modules, name, output) for name in blame.modules]
        if blame.loss or not found:
            found.append(in_loss(loss) if blame.certain else in_either(loss))
        return found

    def _taken_up(self) -> list[Finding]:
        return self.remembered(())

    def remembered(self, put_back: Collection[tuple[str, str]]) -> list[Finding]:
        """What has taken up records in the runs so far, but for the (module, attribute)s that somebody puts back."""
        found = []
        for slots, words in ((self.taken_up, kept), (self.counted - self.taken_up, counted)):
            for name in self.subject.modules:
                attributes = [
                    slot.attribute
                    for slot in sorted(slots)
                    if slot.module == name and (name, slot.attribute) not in put_back
                ]
                found += [words(self.subject.modules, name, attributes)] if attributes else []
        return found


def _different(one: Mapping[Slot, object], other: Mapping[Slot, object], *, registered: bool) -> set[Slot]:
    """The slots that two runs left in different states."""
    slots = {slot for slot in one.keys() | other.keys() if slot.registered == registered}
    return {slot for slot in slots if slot not in one or slot not in other or not same(one[slot], other[slot])}
