"""All mutations. Each is a mistake that somebody could make, which compiles and runs, and which named tests have to notice.

They measure the tests, not the code: when tests are rewritten, whatever was killed before has to be killed afterwards
(``python -m tests.mutations.run``; ``before.json`` holds the test that killed each one before the last restructure).
"""

from __future__ import annotations

from tests.mutations import adaptation, kernels, passes, runtime, training
from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    *kernels.MUTATIONS,
    *passes.MUTATIONS,
    *runtime.MUTATIONS,
    *adaptation.MUTATIONS,
    *training.MUTATIONS,
)
