"""Mutations of plans of several budgets: what is shared, what is held out, intervals, the search for a target."""

from __future__ import annotations

from tests.mutations.mutation import Mutation as M

_SEVERAL, _TARGETS, _CURVE = "tests/recipes/test_several_budgets.py", "tests/unit/test_targets.py", "tests/unit/test_curve.py"

MUTATIONS = (
    M("measured-on-calibration-text", "Batches that plans are measured on are calibrated on as well.",
      "rana_fx/calibration/withheld.py", "                continue\n", "",
      "tests/calibration/test_withheld.py"),
    M("candidates-of-the-first-budget-only", "The first of several budgets releases the candidates that the others need.",
      "rana_fx/recipes/rana/recipe.py", "self._recipe, keep=True)", "self._recipe, keep=False)",
      f"{_SEVERAL}::test_each_plan_is_the_one_of_its_budget_alone -k rana-flops"),
    M("skips-of-the-first-budget-only", "Plans of several budgets lack the reasons found before the budget mattered.",
      "rana_fx/recipes/rana/recipe.py", "        problem.skips += skips\n", "",
      f"{_SEVERAL}::test_skips_found_before_a_budget_matters_are_those_of_every_plan"),
    M("plans-share-tensors", "Training the factors of one plan changes another one.",
      "rana_fx/recipes/sharing.py", "key: value.clone() for", "key: value for",
      f"{_SEVERAL}::test_each_plan_is_the_one_of_its_budget_alone -k 'static or rana'"),
    M("memory-unbounded", "What budgets share is kept however large it is.",
      "rana_fx/recipes/memory.py", "if needed <= self._room:", "if True:",
      f"{_SEVERAL}::test_memory_is_bounded"),
    M("mean-instead-of-bound", "A target is kept by the mean, not by the upper end of the interval.",
      "rana_fx/curve.py", "found.high <= self.limit", "found.mean <= self.limit",
      f"{_TARGETS}::test_the_cheapest_plan_within_a_step"),
    M("normal-instead-of-t", "Intervals of few documents are as narrow as if their deviation were known.",
      "rana_fx/recipes/intervals.py", "t_quantile(number - 1) * math.sqrt(variance)", "_Z * math.sqrt(variance)",
      f"{_CURVE}::test_documents_of_one_length_have_the_interval_of_their_means"),
    M("tokens-as-documents", "The interval is that of independent tokens.",
      "rana_fx/recipes/intervals.py", "/ (number * (number - 1))", "/ float(counts_N.sum()) / (number - 1)",
      f"{_CURVE}::test_intervals_contain_the_mean_as_often_as_they_say"),
    M("padding-measured", "Tokens of padding count in the divergence.",
      "rana_fx/recipes/held_out_quality.py", "_divergence(log_q[real_T], log_p[real_T])", "_divergence(log_q, log_p)",
      f"{_SEVERAL}::test_measurements_are_those_of_the_attached_plan"),
    M("rises-not-noted", "A bound that rises with the budget is not noted.",
      "rana_fx/targets.py", "right.high > left.high + _NOTED * limit", "False",
      f"{_TARGETS}::test_a_bound_that_does_not_fall_with_the_budget_is_noted"),
    M("unreachable-budget-leaves-its-stage", "After a budget that cannot be reached, steps count in a stage that is over.",
      "rana_fx/progress.py", "self._stage, self._done, self._total, self._known = before", "self._stage, _, *_ = before",
      "tests/unit/test_progress.py"),
    M("config-before-the-command-line", "A budget in the file of --config replaces a target on the command line.",
      "rana_fx/commands/adapt.py", '("COMMANDLINE", "DEFAULT_MAP")', '("DEFAULT_MAP", "COMMANDLINE")',
      "tests/cli/test_adapt_targets.py"),
    M("curve-not-in-the-digest", "A promise can be changed on disk.",
      "rana_fx/plan.py", 'facts["curve"] = asdict(self.curve)', "pass",
      f"{_CURVE}::test_a_promise_that_was_changed_is_noticed"),
    M("curve-of-an-untrained-plan", "A trained plan has what the plan lost before training.",
      "rana_fx/training/export.py", "adapters=adapters, curve=None)", "adapters=adapters)",
      "tests/training/test_export.py::test_a_trained_plan_has_no_curve"),
)  # fmt: skip
