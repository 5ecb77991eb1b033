"""Public path of the lm-evaluation-harness model (rana_fx/integrations/lm_eval_harness.py)."""

from rana_fx.integrations.lm_eval_harness import PAPER_TASKS, RanaLM, run_tasks

__all__ = ["PAPER_TASKS", "RanaLM", "run_tasks"]
