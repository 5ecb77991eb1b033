"""Mutations of ``compare`` and ``sweep``: what is measured, what is said of it, which budget is recommended."""

from __future__ import annotations

from tests.mutations.mutation import Mutation as M

_COMPARE, _CLI = "tests/evaluation/test_compare.py", "tests/cli/test_compare_sweep.py"

MUTATIONS = (
    M("decodes-at-the-wrong-position", "Tokens are decoded one position too far.",
      "rana_fx/evaluation/decoding.py", "index : index + 1]", "index + 1 : index + 2]",
      f"{_COMPARE}::test_decoding_is_that_of_generate"),
    M("cache-of-the-other-model", "A round decodes after the tokens that another one left in the cache.",
      "rana_fx/evaluation/decoding.py", "        self._cache.reset()\n", "",
      f"{_COMPARE}::test_decoding_is_that_of_generate"),
    M("dense-compiled-by-rana", "The adapted model is compared with itself.",
      "rana_fx/evaluation/compare.py", 'backend="inductor", mode=mode', "backend=backend, mode=mode",
      f"{_COMPARE}::test_both_models_are_compiled_each_as_itself_in_one_mode"),
    M("noise-is-a-gain", "A model that was faster in some rounds only is reported as faster.",
      "rana_fx/evaluation/compare.py", "self.speedup.low > 1", "self.speedup.mean > 1",
      f"{_COMPARE}::test_nothing_is_gained_on_a_cpu_and_why"),
    M("rows-of-one-document-have-an-interval", "Parts of one document count as documents of their own.",
      "rana_fx/evaluation/compare.py", "if not independent:", "if False:",
      f"{_COMPARE}::test_memory_and_what_a_token_reads"),
    M("agreement-over-padding", "Tokens of padding count as agreed upon.",
      "rana_fx/recipes/held_out_quality.py", "(log_q[real_T].argmax(-1) == log_p[real_T].argmax(-1))",
      "(log_q.argmax(-1) == log_p.argmax(-1))",
      f"{_COMPARE}::test_quality_is_that_of_the_two_models"),
    M("losses-exchanged", "The adapted model has the dense model's perplexity.",
      "rana_fx/evaluation/compare.py", "measured.adapted_loss if adapted", "measured.adapted_loss if not adapted",
      f"{_COMPARE}::test_quality_is_that_of_the_two_models"),
    M("knee-in-other-units", "The knee depends on the unit of the cost.",
      "rana_fx/knee.py", "(1.0 - cost) / width - loss / height", "(1.0 - cost) - loss / height",
      "tests/unit/test_knee.py"),
    M("knee-above-the-chord", "A point that loses more than its share is recommended.",
      "rana_fx/knee.py", "best if below[best] > 1e-9 else None", "best",
      "tests/unit/test_knee.py"),
    M("recommends-the-first-plan", "The next command of a sweep uses another plan than the knee's.",
      "rana_fx/commands/sweep.py", "folders[0 if best is None else best]", "folders[-1]",
      f"{_CLI}::test_plans_of_a_sweep_and_its_recommendation"),
)  # fmt: skip
