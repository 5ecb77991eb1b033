"""Make "rana" a valid backend name for ``accelerate``, and with it for the Trainer of transformers.

In: nothing. Out: accelerate accepts "rana" as a backend. It looks names up in an Enum of its own, which does not include backends
that are registered with ``torch.compile`` (accelerate 1.15).
"""

from __future__ import annotations

from rana_fx.errors import MissingPackage

_NAME = "RANA"  # accelerate looks names up in upper case, and passes them to torch.compile in lower case


def register_with_accelerate() -> None:
    """Make ``TrainingArguments(torch_compile_backend="rana")`` and ``TorchDynamoPlugin(backend="rana")`` valid, in this process.

    Raises:
        MissingPackage: accelerate is not installed.
    """
    try:
        from accelerate.utils import DynamoBackend
    except ImportError as error:
        raise MissingPackage(what='torch_compile_backend="rana"', package="accelerate", extra="train") from error
    if _NAME in DynamoBackend:
        return
    member = str.__new__(DynamoBackend, _NAME)
    member._name_ = member._value_ = _NAME

    def missing(cls: type, value: object) -> object:  # noqa: ARG001
        return member if value == _NAME else None

    # an Enum calls _missing_ for values that it does not have; accelerate does not override it
    DynamoBackend._missing_ = classmethod(missing)
