"""Every exception of the package: its message is complete, keeps its facts, and survives a process boundary.

EXAMPLES has one entry per class of rana_fx.errors and is compared with what that module defines, so that a new class
without an entry fails here. The package's ``raise`` statements are parsed, too: each must give the facts of its message.
"""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import string
from pathlib import Path

import pytest

import rana_fx.kernels
import rana_fx.passes
from rana_fx import RanaError, errors

SITE = "model.layers.3.mlp.down_proj"

EXAMPLES = {
    "RanaError": {"reason": "it does not work"},
    "BudgetOutOfRange": {"budget": 1.58},
    "BudgetUnreachable": {
        "budget": 0.1,
        "recipe": "cats",
        "lowest": 0.6667,
        "why": "only down_proj adapts",
        "recipes": "paper, teal",
    },
    "BudgetOrTarget": {"got": "budget=0.5, max_kl=0.02"},
    "TargetNotPositive": {"name": "max_kl", "got": -0.1, "example": 0.02},
    "TargetUnreachable": {
        "name": "max_kl",
        "limit": 0.001,
        "recipe": "cats",
        "count": 4,
        "budget": 0.95,
        "best": 0.0042,
        "mean": 0.0038,
        "documents": 20,
    },
    "TargetNotMeasurable": {"name": "max_loss", "model": "Tower", "reason": "its output has no logits"},
    "TooFewHeldOut": {"got": 4, "name": "max_kl", "needed": 8},
    "NothingToSkip": {"recipe": "exact", "count": 7, "found": f"down 0.4% ({SITE})", "least": 0.1},
    "UnknownChoice": {"kind": "impl", "got": "fast", "valid": "reference, auto"},
    "UnknownRecipe": {"kind": "recipe", "got": "papper", "valid": "dense, paper"},
    "UnknownMetric": {"kind": "metric", "got": "watts", "valid": "flops, bytes"},
    "InvalidOption": {"name": "mode", "got": 3, "expected": "a string"},
    "NoSuchLinear": {"option": "skip", "pattern": "*.dwon", "model": "Tower", "near": "did you mean '*.down'?"},
    "NoBatches": {"hint": "a dict of tensors"},
    "TooFewTokens": {"site": SITE, "got": 12, "rank": 704, "needed": 2816},
    "NonFinite": {"site": SITE, "count": 7, "what": "input", "shape": "(4, 704)"},
    "NoLinears": {"model": "Tower", "graphs": 1, "nodes": 9, "skipped": "none"},
    "TraceFailed": {"model": "Tower", "batch": 2, "part": "forward", "reason": "data-dependent branch"},
    "CompilationDisabled": {"reason": "a switch is off", "todo": "Turn it on"},
    "WeightAbsent": {"model": "Tower", "site": SITE},
    "FactorsCalled": {"model": "Tower"},
    "AlreadyAdapted": {"model": "Tower", "recipe": "paper", "budget": 0.58, "digest": "0a1b2c3d"},
    "NoPlan": {"site": SITE},
    "NotApplied": {"site": SITE, "reason": "its input is cast between the product and down", "todo": "Remove the cast."},
    "PlanMismatch": {"model": "Tower", "site": SITE, "got": "shape (4, 4)", "expected": "shape (8, 4)"},
    "WeightsFreed": {"site": SITE, "what": "detach the plan"},
    "PlanVersion": {"path": "plans/p", "got": 9, "expected": 1, "todo": "Upgrade rana_fx."},
    "PlanFileError": {"path": "plans/p", "reason": "plan.json is missing"},
    "PlanWriteError": {"path": "plans/p", "reason": "No space left on device"},
    "NothingToTrain": {"model": "Tower", "what": "factors", "reason": "all are int8", "todo": "train all"},
    "UnknownTarget": {"target": "*.q_proj", "model": "Tower", "names": "head.weight"},
    "LoraBeside": {"site": SITE, "weight": "layers.3.lora_A.default"},
    "MissingPackage": {"what": "LoRA", "package": "peft", "extra": "train"},
    "OutOfMemory": {
        "device": "cuda:0",
        "reason": "tried to allocate 2 GiB",
        "batch_size": 8,
        "context": 512,
        "todo": "lower --batch-size",
    },
    "TooLittleToRefine": {"got": 12, "needed": 32, "held": 8},
    "LossNotFinite": {"step": 7, "what": "loss", "got": "nan", "last": 6, "kept": "no checkpoint was written yet", "rate": 0.5},
    "TooLittleText": {"source": "a.txt", "got": 90, "expected": 128, "trained": 96, "held_out": 32, "batch": 16},
    "CheckpointError": {"path": "out/checkpoint.pt", "reason": "it is of another plan", "todo": "start anew"},
    "CheckpointWriteError": {"path": "out/checkpoint.pt", "reason": "No space left on device", "kept": "It is unchanged"},
    "KernelNotCompiled": {"kernel": "masked_gemv.cu", "reason": "NVRTC of CUDA 13.0 was not found"},
    "BadOperand": {
        "name": "scale",
        "got": "(4,)",
        "expected": "(8,) for an int8 weight",
        "todo": "Pass what quantize.pack returned.",
    },
    "ColumnMissing": {"source": "a.jsonl", "column": "text", "columns": "title, body"},
    "DatasetError": {"source": "a.pdf", "reason": "unknown suffix .pdf"},
    "ModelError": {"source": "no/such", "reason": "no config.json"},
}

CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, RanaError) and cls.__module__ == errors.__name__
}
PLACES = (Path(errors.__file__).parent, Path(rana_fx.passes.__path__[0]), Path(next(iter(rana_fx.kernels.__path__))))


def fields(cls):
    """Names in a message: ``{site}`` -> site."""
    return {name for _, name, _, _ in string.Formatter().parse(cls.message) if name}


def raised():
    """(place, class name, fact names) of every construction of an error class in the package; None where facts come as ``**``."""
    for path in sorted({path for folder in PLACES for path in folder.rglob("*.py")}):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name in CLASSES:
                given = None if any(k.arg is None for k in node.keywords) else {k.arg for k in node.keywords}
                yield pytest.param(name, given, len(node.args), id=f"{path.name}:{node.lineno}-{name}")


def test_every_class_has_an_example():
    assert set(EXAMPLES) == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
class TestEach:
    def test_message_holds_every_fact(self, name):
        facts = EXAMPLES[name]
        error = CLASSES[name](**facts)
        assert set(facts) == fields(CLASSES[name])
        assert error.facts == facts
        text = str(error)
        assert "{" not in text
        assert "}" not in text
        for value in facts.values():
            shown = (f"{value:.3f}", repr(value), str(value)) if isinstance(value, float) else (str(value),)
            assert any(form in text for form in shown), value

    def test_a_missing_fact_is_noticed(self, name):
        facts = dict(EXAMPLES[name])
        facts.popitem()
        with pytest.raises(KeyError):
            CLASSES[name](**facts)

    @pytest.mark.parametrize("clone", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
    def test_survives_a_process_boundary(self, name, clone):
        error = CLASSES[name](**EXAMPLES[name])
        other = clone(error)
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.facts == error.facts

    def test_has_one_public_base_and_a_builtin_one(self, name):
        cls = CLASSES[name]
        assert issubclass(cls, RanaError)
        if cls is not RanaError:
            assert issubclass(cls, (ValueError, RuntimeError, OSError)), "callers who know only Python must be able to catch it"


@pytest.mark.parametrize(("name", "given", "positional"), list(raised()))
def test_the_package_gives_each_error_its_facts(name, given, positional):
    assert positional == 0, "facts are named"
    if given is not None:
        assert given == fields(CLASSES[name])
