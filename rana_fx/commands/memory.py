"""Messages for a training run that is out of memory or was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


@contextmanager
def memory_hints(
    *, device: object, out: Path, batch_size: int, context: int, method: str, distill: float, checkpointing: bool
) -> Iterator[None]:
    """Wraps training. Raises OutOfMemory, with the options to change, and typer.Exit (130) where it was interrupted."""
    import torch

    from rana_fx.errors import OutOfMemory
    from rana_fx.training.checkpoint import NAME

    try:
        yield
    except torch.OutOfMemoryError as error:
        lower = ["lower --batch-size (and raise --accumulate, for as many tokens a step)"] if batch_size > 1 else []
        lower += ["lower --context"] if batch_size == 1 else []
        lower += [] if checkpointing else ["pass --gradient-checkpointing"]
        lower += ["use --method lora"] if method == "full" else []
        lower += ["omit --distill, whose teacher is a copy of the model"] if distill and method != "lora" else []
        facts = {"batch_size": batch_size, "context": context, "todo": ", or ".join(lower)}
        raise OutOfMemory(device=device, reason=str(error).partition("\n")[0].rstrip("."), **facts) from error
    except KeyboardInterrupt:
        kept = (out / NAME).exists()
        then = f"--resume continues from the checkpoint in {out}" if kept else "no checkpoint was written yet"
        typer.echo(f"interrupted: {then}.", err=True)
        raise typer.Exit(130) from None
