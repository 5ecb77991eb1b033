"""Tests can be collected without optional extras: ``pytest -m gpu`` has to start on a machine without them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_collection_needs_no_extra():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--assert=plain", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-p", "tests.support.without_extras", "-m", "gpu"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "tests/kernels/" in done.stdout
    # tests of extras are skipped with the missing package as reason; no other test is left out
    skipped = set(re.findall(r"^SKIPPED \[1\] tests/(\S+?):", done.stdout, re.M))
    assert skipped == {
        "training/test_lora.py",
        "training/test_lora_files.py",
        "integrations/test_trainers.py",
        "integrations/test_lm_eval_harness.py",
    }
