"""The privacy mutants. Each says what it breaks; `tests` are the ones that should notice."""

from __future__ import annotations

from dataclasses import dataclass

ADVICE = "tests/cli/test_advise.py"
AUDIT = "tests/audit/test_step_audit.py"
EMBEDDING = "tests/mechanism/test_embedding.py"
FRAME = "tests/frame/test_frame.py"
ENCODED = "tests/gradients/test_onepass.py::test_encodings_get_the_coordinates_that_they_ask_for"
FAULTS = "tests/faults/test_faults.py"
GROUPS = "tests/mechanism/test_groups.py"
GROUPED = "tests/gradients/test_grouped.py"
LAYERWISE = "tests/mechanism/test_layerwise.py"
MASKS = "tests/gradients/test_masks.py"
MIXED = "tests/privacy/test_mixed.py"
MIXING = "tests/mechanism/test_mixing.py"
SPARSIFICATION = "tests/mechanism/test_sparsification.py"
PUBLIC_NORM = "tests/nn/test_public_norm.py"
STATISTICS = "tests/mechanism/test_private_statistics.py"
FOLDS = "tests/gradients/test_onepass.py::test_rows_fold_into_units"
NOT_COVERED = "tests/gradients/test_not_covered.py"
ONEPASS = "tests/gradients/test_onepass.py"
OPERATORS = "tests/gradients/test_onepass.py::test_operators_agree_with_a_loop"
POISON = "tests/gradients/test_onepass.py::test_a_non_finite_gradient_contributes_exactly_zero"
STREAMED = "tests/gradients/test_streamed.py"
UNCOVERED = "tests/gradients/test_not_covered.py::test_what_is_not_covered_falls_back_and_says_so_once"
VIEWS = "tests/training/test_views.py"
VMAP = "tests/gradients/test_vmap.py"
SUMS = "tests/gradients/test_sums.py"
CLIPPING = "tests/mechanism/test_clipping.py"
NOISE = "tests/mechanism/test_noise.py"
PLAN = "tests/mechanism/test_plan.py"
SAMPLING = "tests/mechanism/test_sampling.py"
TABLE = "tests/privacy/test_table.py"
LEDGER = "tests/privacy/test_ledger.py"
ACCOUNTING = "tests/privacy/test_accounting.py"
CALIBRATION = "tests/privacy/test_calibration.py"
TRAINER = "tests/training/test_trainer.py"
COUPLING = "tests/nn/test_coupling.py"
PRIVATE = "tests/training/test_private.py"
CERTIFICATE = "tests/privacy/test_certificate.py"
VERIFY = "tests/training/test_verify.py"
USERS = "tests/training/test_users.py"
DISCLOSING = "tests/training/test_disclosing.py"
SPLIT = "tests/data/test_split.py"
CACHE = "tests/data/test_cache.py"


@dataclass(frozen=True)
class Mutant:
    """One edit: in `file` (below src/privgrad) the text `before`, which occurs once, becomes `after`."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


MUTANTS = (
    # noise
    Mutant(
        "half the noise",
        "mechanism/noise.py",
        "alpha=by_slot[slot])",
        "alpha=0.5 * by_slot[slot])",
        (NOISE,),
    ),
    Mutant(
        "half the scale, claimed and added",
        "mechanism/noise.py",
        "scales = {part.name: gradient_multiplier * share for",
        "scales = {part.name: 0.5 * gradient_multiplier * share for",
        (FRAME,),
    ),
    Mutant(
        "the last tensor gets no noise",
        "mechanism/noise.py",
        "for slot, value in sums.values.items():",
        "for slot, value in list(sums.values.items())[: max(1, len(sums.values) - 1)]:",
        (NOISE,),
    ),
    Mutant(
        "every tensor gets the same noise",
        "mechanism/noise.py",
        "part.add_(drawn.normal_(buffer[: len(part)]), alpha=by_slot[slot])",
        "part.add_((drawn.normal_(buffer) if slot == next(iter(by_slot)) else buffer)[: len(part)], alpha=by_slot[slot])",
        (NOISE, FRAME),
    ),
    Mutant(
        "the noise of a seeded run repeats in every step",
        "mechanism/noise.py",
        "source.at(receipt.step)",
        "source.at(1)",
        (NOISE,),
    ),
    Mutant(
        "the secure key is a constant",
        "mechanism/randomness.py",
        "algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16))",
        "algorithms.AES256(bytes(32)), modes.CTR(bytes(16))",
        (NOISE,),
    ),
    Mutant(
        "noise and sampling share a seeded stream",
        "mechanism/randomness.py",
        'f"{purpose}:{seed}:{step}"',
        'f"{seed}:{step}"',
        (NOISE,),
    ),
    Mutant(
        "a side release is not charged",
        "mechanism/noise.py",
        "self.multiplier / math.sqrt(1 - self.side_share) if side else self.multiplier",
        "self.multiplier",
        (FRAME,),
    ),
    Mutant(
        "weak noise is released",
        "mechanism/step.py",
        "        self._check(noised)\n",
        "",
        (FRAME,),
    ),
    # clipping
    Mutant(
        "no clipping",
        "mechanism/clipping.py",
        "        limits = thresholds / safe\n        weights = self._clipping.weights(safe, thresholds).clamp(-limits, limits)\n",
        "        weights = torch.ones_like(norms)\n",
        (f"{AUDIT}::test_audit_is_below_the_claim_and_tight",),
    ),
    Mutant(
        "a clipping stage is believed",
        "mechanism/clipping.py",
        ".clamp(-limits, limits)",
        "",
        (CLIPPING,),
    ),
    Mutant(
        "small gradients are blown up",
        "mechanism/clipping.py",
        "(thresholds / norms).clamp_(max=1.0)",
        "(thresholds / norms).clamp_(max=3.0)",
        (FRAME,),
    ),
    Mutant(
        "clip after the sum",
        "gradients/contract.py",
        "total = weighted_sum(weight, flat, request.cap(column))",
        "total = flat.sum(0) * weight.min()",
        (VMAP,),
    ),
    Mutant(
        "NaN is multiplied away instead of selected out",
        "gradients/contract.py",
        "if bool(dropped.any()):",
        "if False:",
        (VMAP,),
    ),
    Mutant(
        "a non-finite norm keeps its weight",
        "mechanism/clipping.py",
        "finite = norms.isfinite()",
        "finite = torch.ones_like(norms, dtype=torch.bool)",
        (CLIPPING,),
    ),
    Mutant(
        "one tensor is left out of the norm",
        "gradients/contract.py",
        "for slot in slots]).sum(0) for slots in request.blocks",
        "for slot in slots[:1]]).sum(0) for slots in request.blocks",
        (VMAP, FRAME),
    ),
    Mutant(
        "blocks need not cover every tensor",
        "mechanism/step.py",
        "        _check_partition(blocks, slots)\n",
        "",
        (FRAME,),
    ),
    Mutant(
        "sums in low precision",
        "gradients/contract.py",
        "return torch.float64 if wide else torch.float32",
        "return next(model.parameters()).dtype",
        (VMAP,),
    ),
    # the one-pass engine
    Mutant(
        "the norm misses the bias of a linear layer",
        "gradients/rules/linear.py",
        "yield bias_owner, Rows(left.squeeze(1) if left.shape[1] == 1 else left.sum(1))",
        "yield bias_owner, Rows(0 * left.sum(1))",
        (OPERATORS,),
    ),
    Mutant(
        "the uses of a tied weight are normed one by one",
        "gradients/terms.py",
        "left = torch.bmm(one.left, other.left.transpose(1, 2))",
        "left = torch.bmm(one.left, other.left.transpose(1, 2)) * torch.eye(one.left.shape[1])",
        (OPERATORS,),
    ),
    Mutant(
        "a tied table's look-ups and products are normed apart",
        "gradients/terms.py",
        "total = total + 2 * _inner(one, other)",
        "total = total + 0 * _inner(one, other)",
        (OPERATORS,),
    ),
    Mutant(
        "a parameter that is used twice is settled after its first use",
        "gradients/collector.py",
        "if weight.name in self._native and len(weight.terms) == weight.expected:",
        "if weight.name in self._native:",
        (OPERATORS,),
    ),
    Mutant(
        "what was written over after it was measured is summed",
        "gradients/collector.py",
        "        if _versions(share) != versions:\n",
        "        if False:\n",
        (NOT_COVERED,),
    ),
    Mutant(
        "a batch of which a part is summed starts anew with another engine",
        "gradients/onepass.py",
        "                if reason.late:\n",
        "                if False:\n",
        (NOT_COVERED,),
    ),
    Mutant(
        "an uncovered parameter is dropped",
        "gradients/onepass.py",
        "        if left is not None:\n            raise NotCoveredError(",
        "        if False:\n            raise NotCoveredError(",
        (UNCOVERED,),
    ),
    Mutant(
        "weights are applied to NaN by multiplication",
        "gradients/norms.py",
        "    if dropped is None:\n        return tensor\n",
        "    return tensor\n",
        (POISON,),
    ),
    Mutant(
        "cancelled Gram norms are believed",
        "gradients/terms.py",
        "for unit in (squares < TRUSTED * largest.square()).nonzero().flatten().tolist():",
        "for unit in []:",
        (f"{ONEPASS}::test_norms_survive_cancellation",),
    ),
    Mutant(
        "automatic clipping divides by next to nothing",
        "mechanism/layerwise.py",
        'check_number("clipping.stability", self.stability, at_least=1e-12)',
        'check_number("clipping.stability", self.stability, above=0)',
        (LAYERWISE,),
    ),
    Mutant(
        "norms are not rounded upwards",
        "gradients/norms.py",
        "_LOST = 4.0",
        "_LOST = 0.0",
        (f"{ONEPASS}::test_rounding_lets_no_unit_contribute_more_than_its_norm",),
    ),
    Mutant(
        "many squares are added up in order",
        "gradients/norms.py",
        "    if count <= SLICE:",
        "    if True:",
        (f"{ONEPASS}::test_norms_of_many_equal_numbers_are_not_too_small",),
    ),
    Mutant(
        "norms are rounded to the nearest",
        "gradients/norms.py",
        "_ADDED = 16.0",
        "_ADDED = 0.0",
        (f"{ONEPASS}::test_norms_of_many_equal_numbers_are_not_too_small",),
    ),
    Mutant(
        "Gram norms do not count what squares hide",
        "gradients/terms.py",
        "rounded = upwards(squares, reduce(torch.add, (most for _, most in lengths)), by_gram=True)",
        "rounded = upwards(squares, largest, by_gram=True)",
        (f"{ONEPASS}::test_the_norm_of_a_product_does_not_leave_the_range_of_floats",),
    ),
    Mutant(
        "a convolution's Gram norms do not count what squares hide",
        "gradients/rules/convolution.py",
        "rows, columns = rows + hidden(",
        "rows, columns = rows + 0 * hidden(",
        (f"{ONEPASS}::test_the_norm_of_a_product_does_not_leave_the_range_of_floats",),
    ),
    Mutant(
        "the vectors of slower engines are added up in order",
        "gradients/contract.py",
        "    lengths = {slot: norms_of(flat) for slot, flat in flats.items()}",
        "    lengths = {slot: torch.linalg.vector_norm(flat, dim=1) for slot, flat in flats.items()}",
        (VMAP,),
    ),
    Mutant(
        "tiny times huge has the norm zero",
        "gradients/terms.py",
        "return (factors_of(units.left) * factors_of(units.right)).square()",
        "return (norms_of(units.left) * norms_of(units.right)).square()",
        (f"{ONEPASS}::test_the_norm_of_a_product_does_not_leave_the_range_of_floats",),
    ),
    Mutant(
        "padding is counted",
        "gradients/rules/embedding.py",
        "            if padding is not None:\n",
        "            if False:\n",
        (OPERATORS,),
    ),
    Mutant(
        "rows of one unit are clipped one by one in one pass",
        "gradients/collector.py",
        "weight.append(self._cut(weight, term).folded(self.folding))",
        "weight.append(self._cut(weight, term))",
        (FOLDS,),
    ),
    Mutant(
        "a row's factor is forgotten",
        "gradients/folding.py",
        "        if self.scale is None:\n            return gradient\n",
        "        return gradient\n",
        (FOLDS,),
    ),
    Mutant(
        "windows that cross images are left out of a Gram matrix",
        "gradients/rules/convolution.py",
        "units = images.reshape(-1, self.geometry.images, *images.shape[1:]).transpose(1, 2)",
        "units = images.reshape(-1, self.geometry.images, *images.shape[1:]).transpose(1, 2) * (torch.arange("
        "self.geometry.images) < 1).view(-1, *[1] * (images.dim() - 2))",
        (OPERATORS,),
    ),
    Mutant(
        "a derived weight's gradient does not reach its parameter",
        "gradients/collector.py",
        "            if part is not None:\n                parent.append",
        "            if False:\n                parent.append",
        (OPERATORS,),
    ),
    Mutant(
        "a block without gradients is not asked for",
        "gradients/collector.py",
        "        self._settle([*self._ready, *(column for column in self._open if column not in self._ready)])\n",
        "        self._settle([c for c in self._open if self._squares[:, c].any() or self._totals[c]])\n",
        (f"{ONEPASS}::test_every_block_is_asked_for_also_where_nothing_was_used",),
    ),
    Mutant(
        "encoded parameters are summed as they are",
        "gradients/collector.py",
        "or (request.encoding.need(name) is Need.NORMS and slots.get(name) == parameter.shape)",
        "or slots.get(name, parameter.shape) == parameter.shape",
        (ENCODED,),
    ),
    Mutant(
        "what a hidden operator leaves in .grad passes",
        "gradients/loss.py",
        "    if found:\n",
        "    if False:\n",
        (f"{NOT_COVERED}::test_a_backward_pass_with_side_effects_is_refused",),
    ),
    Mutant(
        "buffers carry over from group to group",
        "gradients/loss.py",
        "            owner._buffers[name] = tensor\n",
        "            pass\n",
        (STREAMED, f"{ONEPASS}::test_buffers_are_as_they_were"),
    ),
    Mutant(
        "tables that forward rescales are accepted",
        "gradients/streamed.py",
        "        if versions != [",
        "        if False and versions != [",
        (STREAMED,),
    ),
    # sensitivity and the table
    Mutant(
        "groups are charged C instead of 2C",
        "privacy/sensitivity.py",
        "return bound.diameter if grouped else bound.radius",
        "return bound.radius",
        (TABLE, FRAME),
    ),
    Mutant(
        "a replaced record is charged as an absent one",
        "privacy/sensitivity.py",
        "return 1.0 if grouped else 2.0",
        "return 1.0",
        (TABLE,),
    ),
    Mutant(
        "Poisson replace_one without the engine's doubling",
        "privacy/events.py",
        "(Sampler.POISSON, Adjacency.REPLACE_ONE): (NeighboringRelation.REPLACE_ONE, (_PLD,)),",
        "(Sampler.POISSON, Adjacency.REPLACE_ONE): (NeighboringRelation.REPLACE_SPECIAL, (_PLD,)),",
        (TABLE,),
    ),
    Mutant(
        "RDP for Poisson replace_one is not refused",
        "privacy/events.py",
        "(Sampler.POISSON, Adjacency.REPLACE_ONE): (NeighboringRelation.REPLACE_ONE, (_PLD,)),",
        "(Sampler.POISSON, Adjacency.REPLACE_ONE): (NeighboringRelation.REPLACE_ONE, (_PLD, _RDP)),",
        (TABLE,),
    ),
    Mutant(
        "joint multiplier adds instead of whitening",
        "privacy/sensitivity.py",
        "together = math.hypot(*ratios)",
        "together = max(ratios, default=0.0)",
        (TABLE,),
    ),
    # sampling and units
    Mutant(
        "full batches accounted as Poisson",
        "mechanism/sampling.py",
        "        return source.coins(units, self.probability).nonzero().flatten()",
        "        return source.coins(units, 1.0).nonzero().flatten()",
        (SAMPLING,),
    ),
    Mutant(
        "fixed-size batches accounted as Poisson",
        "mechanism/sampling.py",
        "        return source.coins(units, self.probability).nonzero().flatten()",
        "        return torch.randperm(units)[: round(units * self.probability)].sort().values",
        (SAMPLING,),
    ),
    Mutant(
        "the same sample in every step",
        "mechanism/sampling.py",
        "        return source.coins(units, self.probability).nonzero().flatten()",
        "        return (torch.rand(units, generator=torch.Generator().manual_seed(1)) < self.probability)"
        ".nonzero().flatten()",
        (SAMPLING,),
    ),
    Mutant(
        "each record of a user is a unit of its own weight",
        "training/units.py",
        "1.0 / counts.to(torch.float32).repeat_interleave(counts)",
        "torch.ones(len(rows))",
        (USERS,),
    ),
    Mutant(
        "a user's records are clipped one by one",
        "training/units.py",
        "return Drawn(rows, Fold(index, len(drawn),",
        "return Drawn(rows, Fold.identity(len(rows))) if len(rows) else Drawn(rows, Fold(index, len(drawn),",
        (USERS,),
    ),
    Mutant(
        "records are sampled where users are promised",
        "training/private.py",
        "self.plan.sampling.draw(self._units.count, step",
        "self.plan.sampling.draw(self._units.count // 2, step",
        (USERS,),
    ),
    Mutant(
        "the training loss is written though nobody asked",
        "training/trainer.py",
        "        if self.plan.disclose:\n",
        "        if True:\n",
        (DISCLOSING,),
    ),
    Mutant(
        "a disclosure that the certificate does not name",
        "privacy/certificate.py",
        '"disclosed": list(facts.disclosed),',
        '"disclosed": [],',
        (DISCLOSING,),
    ),
    Mutant(
        "fixed size is accounted at half the distance",
        "privacy/events.py",
        "gaussian = dp_accounting.GaussianDpEvent(doubled)",
        "gaussian = dp_accounting.GaussianDpEvent(multiplier)",
        (TABLE,),
    ),
    Mutant(
        "a truncated sample is accounted as plain Poisson",
        "privacy/events.py",
        "                sampled.dataset_size, sampled.rate, sampled.batch_size, multiplier\n",
        "                1, sampled.rate, 1, multiplier\n",
        (TABLE,),
    ),
    Mutant(
        "a truncated batch keeps its first records",
        "mechanism/sampling.py",
        "drawn[source.permutation(len(drawn))[: self.max_batch_size]]",
        "drawn[: self.max_batch_size]",
        (SAMPLING,),
    ),
    Mutant(
        "a shuffled run is charged once",
        "mechanism/sampling.py",
        "return -(-steps // self.steps_per_epoch)",
        "return min(1, steps)",
        (SAMPLING,),
    ),
    Mutant(
        "a resumed epoch is shuffled anew",
        "mechanism/sampling.py",
        "order = torch.randperm(units, generator=generator)",
        "order = torch.randperm(units)",
        (SAMPLING,),
    ),
    Mutant(
        "steps without a cost are read from any ledger",
        "privacy/ledger.py",
        "(terms.sampler is not Sampler.SHUFFLED or step == 1)",
        "False",
        (LEDGER,),
    ),
    Mutant(
        "the size of the data set under add_remove",
        "mechanism/sampling.py",
        "if adjacency is Adjacency.ADD_REMOVE and self.dataset_size is not None:",
        "if False:",
        (SAMPLING,),
    ),
    Mutant(
        "a normaliser by the realised batch",
        "mechanism/step.py",
        "        sums = self.clipped_sum(batch, fold)\n",
        "        sums = self.clipped_sum(batch, fold)\n"
        "        [value.mul_(self.plan.divisor / max(1, fold.units)) for value in sums.values.values()]\n",
        (FRAME,),
    ),
    Mutant(
        "an empty batch is not a step",
        "training/batches.py",
        "        yield SampledBatch(data, fold)",
        "        if rows:\n            yield SampledBatch(data, fold)",
        (PRIVATE,),
    ),
    Mutant(
        "a batch can be used twice",
        "training/batches.py",
        "        self._used = True\n",
        "        self._used = False\n",
        (PRIVATE,),
    ),
    Mutant(
        "rows of one unit are clipped one by one",
        "gradients/vmap.py",
        "    if fold.is_identity:\n",
        "    if True:\n",
        (FRAME,),
    ),
    # records of a batch that know of each other
    Mutant(
        "coupling is not looked for",
        "training/private.py",
        "        coupling.check()\n    else",
        "        pass\n    else",
        (PRIVATE,),
    ),
    Mutant(
        "coupling is looked for once, whatever the modes",
        "training/private.py",
        "                self._coupling.check()\n",
        "                pass\n",
        (COUPLING,),
    ),
    Mutant(
        "the detector changes no other record",
        "nn/subject.py",
        "        result = other.clone()\n",
        "        result = own.clone()\n",
        (COUPLING,),
    ),
    Mutant(
        "the detector changes the other records a little only",
        "nn/subject.py",
        "        lambda leaf: leaf * factor if",
        "        lambda leaf: leaf * 1 if",
        (COUPLING,),
    ),
    Mutant(
        "the detector looks at losses only, not at gradients",
        "nn/inspection.py",
        "                coupled = coupled or (changed, row)",
        "                pass",
        (COUPLING,),
    ),
    Mutant(
        "the detector compares no batch of one",
        "nn/inspection.py",
        "        if not self.reference.equal:",
        "        if True:",
        (COUPLING,),
    ),
    Mutant(
        "buffers may take up the records",
        "nn/inspection.py",
        "        self.taken_up |= _different(self.reference.changes, run.changes, registered=True)",
        "        pass",
        (COUPLING,),
    ),
    Mutant(
        "a step may run inside autocast",
        "gradients/precision.py",
        "    if torch.is_autocast_enabled(device.type):",
        "    if False:",
        (CLIPPING,),
    ),
    Mutant(
        "a step may multiply with fewer bits",
        "gradients/precision.py",
        '    if precision != "highest":',
        "    if False:",
        (CLIPPING,),
    ),
    Mutant(
        "a step may multiply with fewer bits, by the newer names of that",
        "gradients/precision.py",
        "        if precision not in _EXACT:",
        "        if False:",
        (CLIPPING,),
    ),
    Mutant(
        "a bias is read on past its end",
        "gradients/products.py",
        "    if not readable or _chosen(",
        "    if _chosen(",
        ("tests/gradients/test_products.py",),
    ),
    Mutant(
        "the copy that is weighted may be the matrix itself",
        "gradients/products.py",
        ".T.clone(memory_format=torch.contiguous_format).mul_(",
        ".T.contiguous().mul_(",
        ("tests/gradients/test_products.py",),
    ),
    Mutant(
        "a sum is the memory of what was added first",
        "gradients/contract.py",
        "= empty.copy_(value.detach())",
        "= value.detach()",
        (SUMS,),
    ),
    Mutant(
        "what nothing was added to is left out, and gets no noise",
        "gradients/contract.py",
        "return {slot: self.at(slot) for slot in self._shapes}",
        "return dict(self._sums)",
        (SUMS,),
    ),
    Mutant(
        "a product without a public name is taken on trust",
        "gradients/products.py",
        "    return linear if same else None",
        "    return linear",
        ("tests/gradients/test_products.py",),
    ),
    Mutant(
        "workers share their first slot only",
        "mechanism/step.py",
        "for value in sums.values.values():",
        "for value in [*sums.values.values()][:1]:",
        (f"{FRAME}::test_two_processes_agree_with_one",),
    ),
    Mutant(
        "every worker adds noise of its own",
        "mechanism/step.py",
        "        if self.reduce is not None and self.plan.noise.multiplier:",
        "        if False:",
        (f"{FRAME}::test_workers_that_would_each_add_noise_of_their_own_are_refused",),
    ),
    Mutant(
        "what a model remembers in eval mode is not looked for where records are measured in it",
        "training/private.py",
        "            coupling.check_memory()\n    chosen",
        "            pass\n    chosen",
        (f"{STATISTICS}::test_a_model_that_remembers_records_in_eval_mode_is_refused",),
    ),
    Mutant(
        "a collate function may mix records",
        "training/private.py",
        "        check_apart(dataset, collate_fn)",
        "        pass",
        (f"{PRIVATE}::test_a_collate_function_that_mixes_records_is_refused",),
    ),
    Mutant(
        "a group may leave something to the next",
        "training/private.py",
        "        coupling.check_memory()\n    if isinstance",
        "        pass\n    if isinstance",
        (f"{PRIVATE}::test_what_a_group_would_leave_to_the_next_is_refused",),
    ),
    Mutant(
        "what a group may leave to the next is looked for once, whatever the modes",
        "training/private.py",
        "                self._coupling.check_memory()",
        "                pass",
        (f"{PRIVATE}::test_a_layer_that_starts_to_remember_after_a_change_of_modes_is_refused_with_groups",),
    ),
    Mutant(
        "buffers of scripted modules are thought to be put back",
        "nn/coupling.py",
        "if not isinstance(module, torch.jit.ScriptModule)",
        "if True",
        (f"{PRIVATE}::test_what_a_group_would_leave_to_the_next_is_refused",),
    ),
    Mutant(
        "the probe holds a record",
        "nn/probe.py",
        "        return SyntheticProbe(pytree.tree_unflatten(template, structure))",
        "        return PublicProbe(pytree.tree_map(lambda leaf: torch.cat([leaf, leaf + 1]), batch))",
        (COUPLING,),
    ),
    # accounting
    Mutant(
        "steps are counted once",
        "privacy/events.py",
        "[dp_accounting.SelfComposedDpEvent(event, count) for event",
        "[dp_accounting.SelfComposedDpEvent(event, 1) for event",
        (ACCOUNTING,),
    ),
    Mutant(
        "calibration stops on the coarse grid's wrong side",
        "privacy/calibration.py",
        "    return high\n\n\ndef _bracket",
        "    return low\n\n\ndef _bracket",
        (CALIBRATION,),
    ),
    Mutant(
        "epsilon is rounded down",
        "privacy/certificate.py",
        "rounding=ROUND_CEILING",
        "rounding='ROUND_HALF_EVEN'",
        (CERTIFICATE,),
    ),
    Mutant(
        "moments for statistics are not clipped",
        "mechanism/private_statistics.py",
        "ClippingRule(FlatClipping(self.max_norm), torch.tensor([self.max_norm], dtype=torch.float64))",
        "ClippingRule(FlatClipping(1e9), torch.tensor([1e9], dtype=torch.float64))",
        (f"{STATISTICS}::test_one_clip_over_all_layers_bounds_what_a_unit_adds",),
    ),
    Mutant(
        "statistics get half the noise",
        "mechanism/private_statistics.py",
        "return Bound.ball(self.max_norm)",
        "return Bound.ball(0.5 * self.max_norm)",
        (f"{STATISTICS}::test_what_is_installed_has_the_noise_that_is_claimed",),
    ),
    Mutant(
        "statistics of a group move by R instead of 2R",
        "mechanism/private_statistics.py",
        "return Bound.ball(self.max_norm)",
        "return Bound(self.max_norm, self.max_norm)",
        (f"{STATISTICS}::test_one_clip_over_all_layers_bounds_what_a_unit_adds",),
    ),
    Mutant(
        "statistics of the batch at hand, without noise",
        "mechanism/noise.py",
        "for slot, value in sums.values.items():",
        "for slot, value in ((s, v) for s, v in sums.values.items() if s != 'statistics/side'):",
        (f"{STATISTICS}::test_what_is_installed_has_the_noise_that_is_claimed",),
    ),
    Mutant(
        "the release of statistics is not charged",
        "mechanism/step.py",
        "(_STATISTICS_SLOT,), charged.side_bound(), Consumer.STATISTICS)",
        "(_STATISTICS_SLOT,), Bound.ball(0.0), Consumer.STATISTICS)",
        (f"{STATISTICS}::test_the_joint_multiplier_of_every_step_is_the_plans",),
    ),
    Mutant(
        "statistics divide by the size of the batch at hand",
        "mechanism/private_statistics.py",
        "                add_weighted(Request(None, units, Identity({}), [(slot,)], rule, sink), {slot: moments * scale})",
        "                add_weighted(Request(None, units, Identity({}), [(slot,)], rule, sink), {slot: moments * scale})\n"
        "        sink.values[slot] /= max(1, len(fold.index))",
        (f"{STATISTICS}::test_the_divisor_is_the_constant_never_the_realised_size",),
    ),
    Mutant(
        "moments for statistics are those of the whole batch",
        "gradients/moments.py",
        "yield _folded(_row_moments(module, part, layers), inside)",
        "yield _moments(module, part, layers).expand(inside.units, -1)",
        (f"{STATISTICS}::test_a_records_moments_do_not_move_with_the_others",),
    ),
    Mutant(
        "mixing beside statistics of private records is not refused",
        "mechanism/mixing.py",
        "if isinstance(plan.statistics, ChargedStatistics):",
        "if False:",
        (f"{STATISTICS}::test_what_has_no_proof_or_no_layer_is_refused_in_words",),
    ),
    # ledger, checkpoint, resume
    Mutant(
        "the ledger is written after the noise",
        "mechanism/step.py",
        "        receipt = self.ledger.charge(self.plan.step_event(self.ledger.count + 1))\n"
        "        noised = self.plan.noise.add(sums, receipt, self._noise)\n",
        "        from privgrad.privacy.ledger import Receipt\n\n"
        "        receipt = Receipt(self.ledger.count + 1, self._event)\n"
        "        noised = self.plan.noise.add(sums, receipt, self._noise)\n        self.ledger.charge(self._event)\n",
        (FRAME,),
    ),
    Mutant(
        "the ledger is not flushed",
        "files.py",
        "        _write(descriptor, data)\n        os.fsync(descriptor)\n        self._flushed = True",
        "        _write(descriptor, data)\n        self._flushed = True",
        (LEDGER, FRAME),
    ),
    Mutant(
        "a flush that failed is believed later",
        "files.py",
        "        if not self._flushed:\n",
        "        if False:\n",
        (FAULTS,),
    ),
    Mutant(
        "files are replaced before they are on the disk",
        "files.py",
        "            _write(descriptor, data)\n            os.fsync(descriptor)\n",
        "            _write(descriptor, data)\n",
        (FAULTS,),
    ),
    Mutant(
        "a rename is not flushed",
        "files.py",
        "        os.replace(temporary, path)\n        sync_directory(path.parent)\n",
        "        os.replace(temporary, path)\n",
        (FAULTS,),
    ),
    Mutant(
        "two processes share a ledger",
        "files.py",
        "fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        (LEDGER,),
    ),
    Mutant(
        "a torn line stays",
        "privacy/ledger.py",
        "            if record.torn:\n",
        "            if False:\n",
        (LEDGER,),
    ),
    Mutant(
        "a resumed run does not ask what its checkpoint has seen",
        "training/trainer.py",
        '            self.run.check_tail(saved["ledger"])\n',
        "",
        (TRAINER,),
    ),
    Mutant(
        "dropout draws from the published seed",
        "training/private.py",
        "            seed_all(_seed(source.at(self.ledger.count + 1)), devices)\n",
        "",
        ("tests/training/test_randomness.py",),
    ),
    Mutant(
        "the noise has no tails",
        "mechanism/randomness.py",
        "uniform.log_().mul_(-2)",
        "uniform.clamp_(min=1e-3).log_().mul_(-2)",
        (NOISE,),
    ),
    Mutant(
        "angles are the bits of the radii",
        "mechanism/randomness.py",
        "halves[2 * pairs : 3 * pairs]",
        "halves[1 : 2 * pairs : 2]",
        (NOISE,),
    ),
    Mutant(
        "the generators' state tells the size of private batches",
        "training/private.py",
        "        with same_randomness(devices):\n            seed_all",
        "        if True:\n            seed_all",
        ("tests/training/test_randomness.py",),
    ),
    Mutant(
        "a record's views count one by one",
        "training/units.py",
        "return Drawn(rows, Fold(index, fold.units, (scale / views).repeat_interleave(views)))",
        "return Drawn(rows, Fold(torch.arange(len(rows)), len(rows)))",
        (VIEWS,),
    ),
    # groups, layers, thresholds
    Mutant(
        "groups by chunking",
        "mechanism/groups.py",
        "drawn = source.integers(fold.units, self.count)",
        "drawn = __import__('torch').arange(fold.units) * self.count // max(1, fold.units)",
        (GROUPS,),
    ),
    Mutant(
        "groups of different sizes: rows overwrite one another",
        "gradients/folding.py",
        "(counts.cumsum(0) - counts)[self.index]",
        "counts.cumsum(0)[self.index].clamp(max=0)",
        (GROUPED,),
    ),
    Mutant(
        "groups of different sizes: a row has another group's weight",
        "gradients/terms.py",
        "weights = weights[self.ragged.index]",
        "weights = weights[self.ragged.index.flip(0)]",
        (GROUPED,),
    ),
    Mutant(
        "rows that see one another are taken one by one",
        "gradients/grouped.py",
        "if not self._apart():",
        "if False:",
        (GROUPED,),
    ),
    Mutant(
        "local steps stay in the weights",
        "gradients/streamed.py",
        "                    parameter.copy_(before[name])",
        "                    pass",
        (GROUPS,),
    ),
    Mutant(
        "a user's records go to several groups",
        "mechanism/groups.py",
        "return Fold(drawn[fold.index], self.count, fold.scale)",
        "return Fold(source.integers(len(fold.index), self.count), self.count, fold.scale)",
        (GROUPS,),
    ),
    Mutant(
        "the price of layers is dropped",
        "mechanism/noise.py",
        "return [math.sqrt(len(distances)) * distance for distance in distances]",
        "return list(distances)",
        (LAYERWISE,),
    ),
    Mutant(
        "noise by dimension without its sum",
        "mechanism/noise.py",
        "math.sqrt(distance / math.sqrt(size) * together)",
        "math.sqrt(distance / math.sqrt(size) * distance * math.sqrt(size))",
        (LAYERWISE,),
    ),
    Mutant(
        "coordinates are not cut",
        "gradients/collector.py",
        "                if cap is not None:",
        "                if False:",
        (CLIPPING,),
    ),
    Mutant(
        "coordinates are cut in the reference engine's sum, and not in each unit",
        "gradients/contract.py",
        "return (weights[:, None] * vectors).clamp_(-cap, cap).sum(0)",
        "return (weights @ vectors).clamp_(-cap, cap)",
        (CLIPPING,),
    ),
    Mutant(
        "blocks that leave out a parameter",
        "mechanism/layerwise.py",
        "    if missing or twice:",
        "    if twice:",
        (LAYERWISE,),
    ),
    Mutant(
        "a group's bits are charged as an absent one's",
        "mechanism/thresholds.py",
        "return Bound(diagonal / 2, diagonal)",
        "return Bound(diagonal / 2, diagonal / 2)",
        (LAYERWISE,),
    ),
    Mutant(
        "norms are released uncut",
        "mechanism/thresholds.py",
        "return norms.clamp(0.0, self.limit)",
        "return norms",
        (LAYERWISE,),
    ),
    Mutant(
        "bits count twice",
        "mechanism/thresholds.py",
        "return (norms <= thresholds).to(norms.dtype) - 0.5",
        "return (2 * (norms <= thresholds)).to(norms.dtype) - 1.0",
        (LAYERWISE,),
    ),
    Mutant(
        "the private data may be called public",
        "training/public.py",
        "    if public is private:",
        "    if False:",
        (LAYERWISE,),
    ),
    Mutant(
        "public data may hold private records",
        "training/public.py",
        "if any(_digest(row) in known for row in ours):",
        "if False:",
        (LAYERWISE,),
    ),
    # mixing
    Mutant(
        "no width where the weights coincide",
        "mechanism/mixing.py",
        ".floor_().clamp_(min=1.0)",
        ".floor_()",
        (MIXING,),
    ),
    Mutant(
        "a width that is no whole number of tau",
        "mechanism/mixing.py",
        "(gap.abs() / width).floor_()",
        "(gap.abs() / width)",
        (MIXING,),
    ),
    Mutant(
        "biases are not mixed",
        "mechanism/mixing.py",
        ".clamp_(min=1.0).mul_(width)",
        ".clamp_(min=1.0).mul_(width if now.dim() > 1 else 0.0)",
        (MIXING,),
    ),
    Mutant(
        "momentum under mixing",
        "training/private.py",
        'plain = ("momentum", "weight_decay", "dampening", "nesterov", "maximize")',
        'plain = ("weight_decay", "dampening", "nesterov", "maximize")',
        (MIXING,),
    ),
    Mutant(
        "groups are mixed as if they were units",
        "mechanism/plan.py",
        "presence_distance(Bound.ball(radius), grouped=self.groups is not None)",
        "presence_distance(Bound.ball(radius), grouped=False)",
        (MIXING,),
    ),
    Mutant(
        "a coordinate is believed to move less than it does",
        "mechanism/plan.py",
        'float(getattr(self.clipping, "p", 1.0))',
        '4 * float(getattr(self.clipping, "p", 1.0))',
        (MIXING,),
    ),
    Mutant(
        "mixing under any clipping",
        "mechanism/mixing.py",
        "if type(plan.clipping) not in (FlatClipping, CoordinateClipping, LayerwiseClipping):",
        "if False:",
        (MIXING,),
    ),
    Mutant(
        "the supremum is looked for at the largest shift only",
        "privacy/mixed.py",
        "        if not active.any():",
        "        if True:",
        (MIXED,),
    ),
    Mutant(
        "the expansion of the sample stops early",
        "privacy/mixed.py",
        "logsumexp(chances + excess[: len(k)])",
        "logsumexp(chances + numpy.minimum(excess[: len(k)], excess[0]))",
        (MIXED,),
    ),
    # sparsification
    Mutant(
        "the mask is drawn from the data",
        "mechanism/sparsification.py",
        "            places = self._places[name].to(gradient.device)",
        "            places = gradient.flatten(1).abs().sum(0).topk(len(self._places[name])).indices",
        (SPARSIFICATION,),
    ),
    Mutant(
        "another mask for the norms than for the sums",
        "gradients/terms.py",
        "return replace(self, left=self.left.index_select(2, rows.to(self.left.device)))",
        "return replace(self, left=self.left[:, :, : len(rows)])",
        (SPARSIFICATION,),
    ),
    Mutant(
        "masked look-ups stay in the sum",
        "gradients/terms.py",
        "self.right.masked_fill((found < 0)[..., None], 0)",
        "self.right",
        (SPARSIFICATION,),
    ),
    Mutant(
        "the last kept coordinate is not in the norm",
        "gradients/collector.py",
        "    zeros.view(-1)[places.to(weight.device)] = 1",
        "    zeros.view(-1)[places[:-1].to(weight.device)] = 1",
        (MASKS,),
    ),
    Mutant(
        "other coordinates are released than the norm is of",
        "gradients/collector.py",
        "value.flatten()[places.to(value.device)]",
        "value.flatten()[: len(places)]",
        (MASKS,),
    ),
    Mutant(
        "numbers too small to be squared are lost from a masked norm",
        "gradients/terms.py",
        "return upwards((norms_of(rows) * (left * right)).square(), left * right)",
        "return (norms_of(rows) * (left * right)).square()",
        (MASKS,),
    ),
    Mutant(
        "the mask of a table is that of its transpose",
        "gradients/terms.py",
        "touched.mul_(mask[places % self.count])",
        "touched.mul_(mask[places // self.count])",
        (MASKS,),
    ),
    Mutant(
        "a unit that is left out stays in a masked sum",
        "gradients/terms.py",
        "        left, right = select(self.left, dropped), select(self.right, dropped)\n        return weighted_product",
        "        left, right = self.left, self.right\n        return weighted_product",
        (MASKS,),
    ),
    Mutant(
        "the mask is drawn with secret randomness",
        "mechanism/sparsification.py",
        "return torch.randperm(count, generator=generator)[:kept].sort().values",
        "return torch.randperm(count)[:kept].sort().values",
        (SPARSIFICATION,),
    ),
    Mutant(
        "the calibrated width is one too narrow",
        "privacy/calibration.py",
        "low, high = (low, middle) if spent(middle) <= target else (middle, high)\n    return high",
        "low, high = (low, middle) if spent(middle) <= target else (middle, high)\n    return low",
        (MIXING,),
    ),
    # embedding
    Mutant(
        "the first of several blocks is not clipped",
        "mechanism/clipping.py",
        "        weights = torch.where(finite & weights.isfinite(), weights, zero)\n",
        "        weights = torch.where(finite & weights.isfinite(), weights, zero)\n"
        "        weights[:, : max(0, len(columns) - 1)] = 1.0\n",
        (f"{EMBEDDING}::test_the_joint_attack_stays_below_the_claim_and_comes_near_it",),
    ),
    Mutant(
        "embeddings get no noise",
        "mechanism/noise.py",
        "            flat = value.view(-1)\n",
        "            flat = value.view(-1)[: 0 if slot.startswith('embedding') else None]\n",
        (EMBEDDING,),
    ),
    Mutant(
        "residuals get no noise",
        "mechanism/noise.py",
        "            flat = value.view(-1)\n",
        "            flat = value.view(-1)[: 0 if slot.startswith('residual') else None]\n",
        (EMBEDDING,),
    ),
    Mutant(
        "the basis is of the private batch",
        "mechanism/embedding.py",
        "            given = {name: gradients[name].reshape(len(gradients[name]), -1) for name in parts}\n",
        "            given = {name: gradients[name].reshape(len(gradients[name]), -1) for name in parts}\n"
        "            basis = torch.linalg.qr(torch.cat(list(given.values()), 1).T).Q.T\n"
        "            for part, own in zip(parts.values(), basis.split([g.shape[1] for g in given.values()], 1)):\n"
        "                part[: len(own)] = own[: len(part)]\n",
        (EMBEDDING,),
    ),
    Mutant(
        "the residual is charged at nothing",
        "mechanism/step.py",
        "Part(block.name, block.slots, Bound.ball(float(threshold)))",
        "Part(block.name, block.slots, Bound.ball(0.0 if block.name == 'residual' else float(threshold)))",
        (EMBEDDING,),
    ),
    Mutant(
        "embedding and residual are charged as if each were alone",
        "mechanism/noise.py",
        "[math.sqrt(len(distances)) * distance for distance in distances]",
        "[distance for distance in distances]",
        (EMBEDDING, FRAME),
    ),
    Mutant(
        "anchors are drawn by a generator that nobody knows",
        "mechanism/embedding.py",
        "torch.randperm(count, generator=generator)",
        "torch.randperm(count)",
        (EMBEDDING,),
    ),
    Mutant(
        "a bound on coordinates is believed after the embedding",
        "mechanism/mixing.py",
        "if type(plan.compression) not in (type(None), RandomSparsification) and not joined:",
        "if False:",
        (EMBEDDING,),
    ),
    Mutant(
        "joined units are not cut",
        "gradients/contract.py",
        "sink.add(name, weighted_sum(scale, flat, joined.cap).view",
        "sink.add(name, weighted_sum(scale, flat, None).view",
        (EMBEDDING,),
    ),
    Mutant(
        "the basis is believed to be orthonormal",
        "gradients/contract.py",
        "scale = (joined.radius / norms).clamp_(max=1.0)",
        "scale = torch.ones_like(norms)",
        (EMBEDDING,),
    ),
    Mutant(
        "joined units are charged for one of their parts",
        "mechanism/step.py",
        "Joined(math.hypot(*thresholds.tolist()), caps[0])",
        "Joined(max(thresholds.tolist()), caps[0])",
        (EMBEDDING,),
    ),
    Mutant(
        "mixing where coordinates have noise of their own",
        "mechanism/mixing.py",
        'and not joined and plan.noise.allocation != "uniform":',
        "and False:",
        (MIXING,),
    ),
    # normalization
    Mutant(
        "private rows are in the statistics",
        "nn/public_norm.py",
        "mean, variance = self.running_mean, self.running_var",
        "variance, mean = torch.var_mean(inputs.detach(), [d for d in range(inputs.dim()) if d != 1])",
        (PUBLIC_NORM,),
    ),
    Mutant(
        "private batches update the statistics",
        "nn/public_norm.py",
        "self.weight, self.bias, False, 0.0, self.eps)",
        "self.weight, self.bias, self.training, 0.1, self.eps)",
        (PUBLIC_NORM,),
    ),
    Mutant(
        "the variance has no floor",
        "mechanism/statistics.py",
        "variance.clamp(min=floor)",
        "variance",
        (PUBLIC_NORM,),
    ),
    Mutant(
        "the final weights keep old statistics",
        "mechanism/step.py",
        'found = self.plan.statistics.final(self.states["statistics"], self._view())',
        'found = self.states["statistics"]',
        (PUBLIC_NORM,),
    ),
    # ledger, checkpoint, resume
    Mutant(
        "a ledger that failed goes on",
        "privacy/ledger.py",
        "        self._broken = True\n        try:",
        "        try:",
        (LEDGER,),
    ),
    Mutant(
        "a resume forgets the steps that a crash lost",
        "privacy/ledger.py",
        "        ledger._events, ledger._count, ledger._head = Counter(record.events), record.count, record.head\n",
        "        ledger._events, ledger._count, ledger._head = Counter(), 0, record.heads[0]\n",
        (LEDGER,),
    ),
    Mutant(
        "a changed line passes",
        "privacy/ledger.py",
        "    if raw != expected:",
        "    if False:",
        (LEDGER,),
    ),
    Mutant(
        "a missing tail passes",
        "training/run.py",
        "    if steps > record.count:",
        "    if False:",
        (VERIFY,),
    ),
    Mutant(
        "a run goes on after its last step",
        "mechanism/step.py",
        "if self.ledger.count >= self.plan.steps:",
        "if False:",
        (PRIVATE,),
    ),
    Mutant(
        "the seed is published",
        "mechanism/plan.py",
        '    if field.name == "insecure_seed" and value is not None:',
        "    if False:",
        (NOISE,),
    ),
    Mutant(
        "mixing gives away the gradient",
        "training/private.py",
        "        if self.plan.mixing is not None:\n            raise RefusedError(",
        "        if False:\n            raise RefusedError(",
        (FRAME,),
    ),
    Mutant(
        "a swapped model passes",
        "training/run.py",
        'if file_digest(self.model) != stored["model_sha256"]:',
        "if False:",
        (VERIFY,),
    ),
    # data
    Mutant(
        "add_remove may shift records between training and test",
        "data/split.py",
        "if adjacency is Adjacency.ADD_REMOVE and key is None:",
        "if False:",
        (SPLIT,),
    ),
    Mutant(
        "a user is on both sides of the split",
        "data/split.py",
        "_hashed_rows(len(part), share) if part.keys is None else",
        "_hashed_rows(len(part), share) if True else",
        (SPLIT,),
    ),
    Mutant(
        "a record that belongs to no user is let in",
        "data/columns.py",
        "first_true(missing | _empty(trimmed))",
        "first_true(missing)",
        (SPLIT,),
    ),
    Mutant(
        "others can read the decoded copy of private images",
        "data/cache.py",
        "os.O_NOFOLLOW, 0o600",
        "os.O_NOFOLLOW, 0o644",
        (CACHE,),
    ),
    # advice
    Mutant(
        "advice is computed from private records",
        "cli/advise.py",
        "public_rows(build_public(config, private), private.train, None)",
        "public_rows(private.train, build_public(config, private), None)",
        (f"{ADVICE}::test_advice_is_a_function_of_public_data",),
    ),
    Mutant(
        "advice takes private records for public ones",
        "cli/advise.py",
        "public_rows(build_public(config, private), private.train, None)",
        "public_rows(build_public(config, private), None, None)",
        (f"{ADVICE}::test_public_data_that_are_the_private_ones_are_refused",),
    ),
)
