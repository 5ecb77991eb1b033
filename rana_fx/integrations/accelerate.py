"""Let ``accelerate``, and with it the Trainer of transformers, compile with this backend.

In: nothing. Out: accelerate takes the name "rana" where it takes those of its own list of backends: it looks each name up in an
Enum, which does not know what ``torch.compile`` knows (accelerate 1.15).
"""

from __future__ import annotations

from rana_fx.errors import MissingPackage

_NAME = "RANA"  # accelerate looks names up in capitals, and hands them to torch.compile in small letters


def register_with_accelerate() -> None:
    """Make ``TrainingArguments(torch_compile_backend="rana")`` and ``TorchDynamoPlugin(backend="rana")`` valid, in this process.

    Raises:
        MissingPackage.
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

    # what an Enum asks for names it does not have; accelerate leaves it to the default, which has none
    DynamoBackend._missing_ = classmethod(missing)
