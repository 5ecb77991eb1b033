"""All mutations. Each is a plausible defect that compiles and runs, and that named tests have to detect.

They measure the tests, not the code: after tests are rewritten, they have to kill every mutation that was killed before
(``python -m tests.mutations.run``; ``before.json`` holds the test that killed each one before the last restructure).
"""

from __future__ import annotations

from tests.mutations import (
    adaptation,
    comparing,
    kernels,
    passes,
    router_tensor_cores,
    runtime,
    targets,
    tensor_cores,
    training,
    usage,
)
from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    *kernels.MUTATIONS,
    *tensor_cores.MUTATIONS,
    *router_tensor_cores.MUTATIONS,
    *passes.MUTATIONS,
    *runtime.MUTATIONS,
    *adaptation.MUTATIONS,
    *targets.MUTATIONS,
    *training.MUTATIONS,
    *usage.MUTATIONS,
    *comparing.MUTATIONS,
)
