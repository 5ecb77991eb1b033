"""llama.cpp in bench.decode: files of each type, the protocol of other variants, losses, and what it cannot do.

llama-cpp-python is replaced by a module with its functions on a model of transformers; the last test runs it where it is
installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GPTNeoXConfig, LlamaConfig

from bench.common.models import SHAPES, build
from bench.speed import gguf_source, latency
from bench.speed.decode import main
from bench.speed.decoding import Decoder
from bench.speed.gguf_source import read_bytes, write_gguf
from bench.speed.llama_engine import TYPES, Engine
from bench.speed.llama_variant import gguf_files
from bench.speed.losses import read_text
from bench.speed.random_plan import PlanConfig
from bench.speed.variants import variants
from rana_fx.errors import InvalidOption, MissingPackage
from rana_fx.evaluation.perplexity import evaluate
from tests.support.architectures import build as build_architecture
from tests.support.fake_llama_cpp import FakeLlamaCpp

CPU = torch.device("cpu")
EMBEDDED = str(next((Path(__file__).resolve().parents[2] / "rana_fx" / "data").glob("tiny-llama*")))
OPTIONS = {"sequences": 2, "longest": 4, "new_tokens": 3, "prefill": 0, "dtype": "float32", "device": "cpu"}
NUMBERS = {name: number for number, name in enumerate(TYPES)}


def rows_of(path, kind):
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


@pytest.fixture
def fake(monkeypatch):
    """Installs the module in place of llama-cpp-python; given a model, it decodes that."""

    def install(model):
        module = FakeLlamaCpp(model)
        monkeypatch.setitem(sys.modules, "llama_cpp", module)
        written = []

        def write(given, path):
            written.append(given)
            path.write_text(str(NUMBERS["F32"]))

        monkeypatch.setattr(gguf_source, "write_gguf", write)
        monkeypatch.setattr(latency, "read_bytes", lambda path: 1000 * (1 + json.loads(path.read_text())))
        return module, written

    return install


@pytest.fixture(autouse=True)
def _other_shapes(monkeypatch):
    facts = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    monkeypatch.setitem(
        SHAPES, "llama", lambda: LlamaConfig(**facts, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True)
    )
    monkeypatch.setitem(
        SHAPES, "gemma", lambda: GemmaConfig(**facts, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True)
    )
    monkeypatch.setitem(SHAPES, "gpt_neox", lambda: GPTNeoXConfig(**facts, tie_word_embeddings=False))


def of(names):
    found = variants(names, [0.5], [], mode="default", configs=[PlanConfig()], prefill="masked")
    return [(variant.label, variant.kind) for variant in found]


def test_types_follow_the_family():
    assert of("llama.cpp:Q4_0, Q8_0,F16,eager,rana,llama.cpp:Q4_K_M,int8") == [
        ("eager", "dense"),
        ("rana 0.5", "rana"),
        ("int8", "int8"),
        *((f"llama.cpp:{name}", "llama.cpp") for name in ("Q4_0", "Q8_0", "F16", "Q4_K_M")),
    ]


@pytest.mark.parametrize("names", ["Q4_0", "llama.cpp", "llama.cpp:", "llama.cpp:Q9_0", "llama.cpp:Q4_0,eager,Q8_0"])
def test_other_types_are_refused(names):
    with pytest.raises(InvalidOption, match=r"llama\.cpp:TYPE; types are F32, F16"):
        of(names)


def test_rows_are_those_of_other_variants(fake, tmp_path, capsys):
    module, written = fake(build("tiny", device=CPU, dtype="float32"))
    out = tmp_path / "rows.jsonl"
    main("tiny", out, names="eager,llama.cpp:Q8_0,Q4_0", batches="1,2", **OPTIONS | {"prefill": 8})
    eager, _, *rows = rows_of(out, "decode")
    assert [(row["variant"], row["variant_kind"], row["mode"], row["batch"]) for row in rows] == [
        (f"llama.cpp:{name}", "llama.cpp", None, 1) for name in ("Q8_0", "Q4_0")
    ]
    for row, name in zip(rows, ("Q8_0", "Q4_0"), strict=True):
        assert row.keys() - eager.keys() == {"conversion", "llama_cpp_python", "loss"} and eager.keys() <= row.keys()
        assert row["contexts"] == eager["contexts"] and row["sequences"] == 2
        assert row["gate"] is None and row["loss"] is None and row["conversion"]["error"] < 1e-5 < row["conversion"]["bound"]
        ms = row["ms_per_token"]
        assert 0 < ms["p20"] <= ms["p50"] <= ms["p80"]
        assert row["weight_gb_per_s"] * ms["p50"] * 1e6 == pytest.approx(1000 * (1 + NUMBERS[name]))
        assert row["dense_ratio"] == pytest.approx(eager["ms_per_token"]["p50"] / ms["p50"])
    assert [(row["variant"], row["batch"]) for row in rows_of(out, "skipped")] == [("llama.cpp:Q8_0", 2), ("llama.cpp:Q4_0", 2)]
    assert all("one sequence at a time" in row["reason"] for row in rows_of(out, "skipped"))
    assert [row["variant"] for row in rows_of(out, "prefill")] == ["eager", "eager", "llama.cpp:Q8_0", "llama.cpp:Q4_0"]
    # one source for both types; its comparison, then each type, in contexts as long as torch's cache and with its threads
    threads, cache = torch.get_num_threads(), eager["cache"]
    context = ("context", cache, cache, threads, threads)
    assert len(written) == 1
    assert module.calls == [
        context, ("quantize", NUMBERS["Q8_0"], threads), context, ("quantize", NUMBERS["Q4_0"], threads), context,
    ]  # fmt: skip
    assert module.open == 0
    assert "llama.cpp:Q4_0" in capsys.readouterr().out


def test_steps_feed_the_greedy_tokens(fake, monkeypatch):
    model = build("tiny", device=CPU, dtype="float32")
    fake(model)
    fed, feed = [], Engine.feed
    monkeypatch.setattr(Engine, "feed", lambda self, tokens, **given: fed.append(tokens) or feed(self, tokens, **given))
    with torch.no_grad(), gguf_files(model, given=None) as files:
        path = files.make("F16", Decoder(model, batch=1, room=64))
        fed.clear()
        with latency.opened(path, Decoder(model, batch=1, room=64, seed=3), room=64) as decoder:
            times, seconds = decoder.decode(None, 9, 5)
        context = Decoder(model, batch=1, room=64, seed=3).tokens(9)
        expected = model.generate(
            context, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(context), eos_token_id=None, pad_token_id=0
        )
    assert [token for tokens in fed for token in tokens] == expected[0].tolist()
    assert [len(tokens) for tokens in fed] == [9, *[1] * 5]
    assert len(times) == 5 and sum(times) == pytest.approx(1000 * seconds)


def test_a_wrong_file_has_no_time(fake, tmp_path):
    fake(build("tiny", device=CPU, dtype="float32", seed=1))
    out = tmp_path / "rows.jsonl"
    main("tiny", out, names="llama.cpp:Q8_0,F16", **OPTIONS)
    assert rows_of(out, "decode") == []
    reasons = [row["reason"] for row in rows_of(out, "skipped")]
    assert len(reasons) == 2 and all("wrong conversion: logits of source.gguf" in reason for reason in reasons)


def test_a_type_that_fails_has_a_row_and_the_next_one_is_timed(fake, tmp_path):
    module, written = fake(build("tiny", device=CPU, dtype="float32"))
    module.refuse = NUMBERS["Q4_0"]
    out, own = tmp_path / "rows.jsonl", tmp_path / "own.gguf"
    own.write_text(str(NUMBERS["F16"]))
    # the second time, half a file of the first time is not taken for a whole one
    main("tiny", out, names="llama.cpp:Q4_0,Q4_0,Q8_0", gguf=own, **OPTIONS)
    skipped = rows_of(out, "skipped")
    assert [row["variant"] for row in skipped] == ["llama.cpp:Q4_0"] * 2
    assert all(row["reason"].endswith("llama.cpp could not write Q4_0: no such type here") for row in skipped)
    assert [row["variant"] for row in rows_of(out, "decode")] == ["llama.cpp:Q8_0"]
    assert written == []


@pytest.mark.parametrize(("package", "named"), [("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")])
def test_a_missing_package_is_the_reason(package, named, fake, tmp_path, monkeypatch):
    original = gguf_source.write_gguf
    fake(build("tiny", device=CPU, dtype="float32"))
    monkeypatch.setattr(gguf_source, "write_gguf", original if package == "gguf" else gguf_source.write_gguf)
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "rows.jsonl"
    main("tiny", out, names="eager,llama.cpp:Q8_0", **OPTIONS)
    (row,) = rows_of(out, "skipped")
    assert row["reason"].startswith("MissingPackage") and f"the package {named}," in row["reason"]
    assert "pip install 'rana-fx[llama]'" in row["reason"]
    assert [row["variant"] for row in rows_of(out, "decode")] == ["eager"]


def test_a_full_cache_is_an_error(fake, tmp_path):
    fake(build("tiny", device=CPU, dtype="float32"))
    (tmp_path / "x.gguf").write_text("0")
    engine = Engine(tmp_path / "x.gguf", room=4, threads=1)
    engine.feed([1, 2, 3])
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4"):
        engine.feed([1, 2])
    engine.close()


@pytest.mark.usefixtures("graphs_as_rewritten")
def test_every_engine_has_its_loss_on_one_text(fake, tmp_path, capsys):
    model = build(EMBEDDED, device=CPU, dtype="float32")
    fake(model)
    text, out = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("The sea was calm and the boat went out with four men in it. " * 60)
    names = "eager,rana,llama.cpp:F16,Q4_0"
    main(EMBEDDED, out, names=names, budgets="0.5", text=text, text_tokens=700, **OPTIONS)
    assert rows_of(out, "skipped") == []
    losses = {row["variant"]: row["loss"] for row in rows_of(out, "decode")}
    assert [tuple(window["input_ids"].shape) for window in read_text(EMBEDDED, text, 700).windows] == [(1, 512), (1, 188)]
    assert {loss["tokens"] for loss in losses.values()} == {511 + 187}
    expected = evaluate(model, read_text(EMBEDDED, text, 700).windows, progress=False).mean_loss
    assert losses["eager"]["mean_loss"] == expected
    assert losses["llama.cpp:F16"]["mean_loss"] == pytest.approx(expected, rel=1e-5)
    halved = evaluate(lambda **given: 0.5 * model(**given).logits, read_text(EMBEDDED, text, 700).windows, progress=False)
    assert losses["llama.cpp:Q4_0"]["mean_loss"] == pytest.approx(halved.mean_loss, rel=1e-5)
    assert losses["rana 0.5"]["mean_loss"] > expected + 0.1
    assert "loss" in capsys.readouterr().out


def test_a_text_needs_a_checkpoint_and_enough_tokens(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm.")
    with pytest.raises(InvalidOption, match="a shape has random weights"):
        read_text("tiny", text, 100)
    with pytest.raises(InvalidOption, match=r"at most the \d+ tokens of the text"):
        read_text(EMBEDDED, text, 100)
    with pytest.raises(InvalidOption, match="at least two"):
        read_text(EMBEDDED, text, 1)


def test_rows_of_queries_and_keys_are_in_the_order_of_the_rotation():
    """Scores of halves rotated as transformers does are those of neighbours rotated as llama.cpp does."""
    config = SHAPES["tiny"]()
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n * width, 64, generator=generator).double() for n in (heads, config.num_key_value_heads))
    x = torch.randn(5, 64, generator=generator).double()
    angles = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]

    def scores(q, k, pairs):
        rotated = [pairs((x @ weight.t()).view(5, -1, width)) * turn for weight in (q, k)]
        wide = rotated[1].repeat_interleave(2, dim=1)
        return torch.einsum("thc,shc->hts", rotated[0], wide.conj()).real

    halves = scores(q, k, lambda v: torch.complex(v[..., : width // 2], v[..., width // 2 :]))
    changed = [gguf_source._llama(f"layers.0.self_attn.{n}_proj.weight", w, config) for n, w in (("q", q), ("k", k))]
    assert torch.allclose(scores(*changed, lambda v: torch.view_as_complex(v.reshape(5, -1, width // 2, 2))), halves)
    assert not torch.allclose(scores(q, k, lambda v: torch.view_as_complex(v.reshape(5, -1, width // 2, 2))), halves)


def test_an_architecture_without_a_conversion_is_refused(tmp_path):
    pytest.importorskip("gguf")
    model, _ = build_architecture("opt", 1)
    with pytest.raises(InvalidOption, match="a model of type opt"):
        write_gguf(model, tmp_path / "x.gguf")


def test_a_file_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackage, match=r"pip install 'rana-fx\[llama\]'"):
        write_gguf(nn.Linear(1, 1), tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", ["tiny", "llama", "gemma", "gpt_neox"])
def test_a_file_holds_all_bytes_that_a_step_reads(kind, tmp_path):
    pytest.importorskip("gguf")
    for dtype in ("float32", "bfloat16", "float16"):
        model = build(kind, device=CPU, dtype=dtype)
        write_gguf(model, tmp_path / f"{dtype}.gguf")
        linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        assert read_bytes(tmp_path / f"{dtype}.gguf") == sum(weight.numel() * weight.element_size() for weight in linears)


@pytest.mark.filterwarnings("default")  # of the packages compared with
@pytest.mark.parametrize("kind", ["tiny", "llama", "gemma", "gpt_neox"])
def test_llama_cpp_itself(kind):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    model = build(kind, device=CPU, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # norms and biases, which random weights leave at 1 and 0
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    ids = torch.randint(128, (1, 30), generator=generator)
    errors = {}
    with torch.no_grad(), gguf_files(model, given=None) as files:
        expected = model(ids).logits
        for name in ("F32", "F16", "Q8_0", "Q4_0"):
            decoder = Decoder(model, batch=1, room=64)
            with latency.opened(files.make(name, decoder), decoder, room=64) as engine:
                errors[name] = float((engine.all_logits(ids) - expected).norm() / expected.norm())
    assert files.conversion["error"] <= files.conversion["bound"] < 0.01
    assert errors["F32"] < files.conversion["bound"]
    assert errors["F32"] <= errors["Q8_0"] < errors["Q4_0"] < 0.5
