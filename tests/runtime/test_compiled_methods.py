"""Methods got through torch.compile's wrapper run the compiled model: ``torch.compile(model, backend=...).generate``."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import transformers as hf
from torch import nn

import rana_fx
from rana_fx._backend import rewritten
from tests.support.adapted import adapted
from tests.support.trained import relative

PROMPT = torch.tensor([[5, 9, 33, 60, 12]])
EPS = torch.finfo(torch.float32).eps


class Model(nn.Module):
    """One linear with an adapter behind one without, and methods that call the model."""

    def __init__(self):
        super().__init__()
        self.stem, self.linear = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.stem(x)
        return x + self.linear(x)

    def twice(self, x):
        return self(self(x))

    def steps(self, x, count):
        for _ in range(count):
            x = self(x)
            yield x
        return "done"

    def raises(self, x):
        self(x)
        raise KeyError("as it happens")

    @staticmethod
    def name():
        return "model"


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    rana_fx.adapt(model, [torch.randn(200, 16)], budget=0.6, recipe="static", progress=False)
    return model


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def test_a_method_runs_the_compiled_model_and_the_models_own_does_not(model):
    fast = torch.compile(model, backend=rewritten)
    adapted_twice, dense_twice = fast(fast(X)), model(model(X))
    assert relative(dense_twice, adapted_twice) > 1e-2
    assert torch.equal(fast.twice(X), adapted_twice)
    assert torch.equal(model.twice(X), dense_twice)
    assert fast.twice.__self__ is model and fast.twice.__name__ == "twice" and fast.name() == "model"
    assert "_compiled_call_impl" not in vars(model)


def test_before_the_first_call(model):
    fast = torch.compile(model, backend=rewritten)
    got = fast.twice(X)
    assert torch.equal(got, fast(fast(X)))


def test_by_name_and_by_options(model):
    options = {"plan": rana_fx.detach(model)}
    fast = torch.compile(model, backend=rana_fx.backend, options=options)
    with torch.no_grad():
        assert relative(fast.twice(X), fast(fast(X))) < 100 * EPS < relative(model.twice(X), fast(fast(X)))


def test_other_backends_are_left_alone(model):
    assert torch.equal(torch.compile(model, backend="eager").twice(X), model.twice(X))
    assert torch.compile(model, backend="eager").twice.__func__ is Model.twice


def test_generators_run_compiled_whenever_they_go_on(model):
    fast = torch.compile(model, backend=rewritten)
    expected, x = [], X
    for _ in range(3):
        x = fast(x)
        expected.append(x)
    got = []
    for step in fast.steps(X, 3):
        got.append(step)
        assert relative(model(X), fast(X)) > 1e-2  # in between, the model's own calls are its own
    assert all(map(torch.equal, got, expected)) and len(got) == 3


def test_errors_leave_the_model_as_it_was(model):
    fast, dense = torch.compile(model, backend=rewritten), model(X)
    with pytest.raises(KeyError, match="as it happens"):
        fast.raises(X)
    assert torch.equal(model(X), dense)


def test_threads(model):
    """While one thread runs a method, calls of the model in another are the model's own."""
    fast, dense = torch.compile(model, backend=rewritten), model(X)
    expected = fast.twice(X)
    inside, go_on, seen = threading.Event(), threading.Event(), {}

    def wait_then_twice(self, x):
        inside.set()
        assert go_on.wait(60)
        return self.twice(x)

    Model.wait_then_twice = wait_then_twice
    try:
        thread = threading.Thread(target=lambda: seen.update(got=fast.wait_then_twice(X)))
        thread.start()
        assert inside.wait(60)
        seen["other"] = model(X)
        seen["method"] = fast.twice(X)  # ends before the other thread's goes on
        go_on.set()
        thread.join()
    finally:
        del Model.wait_then_twice
    assert torch.equal(seen["other"], dense)
    assert torch.equal(seen["method"], expected) and torch.equal(seen["got"], expected)


def test_a_model_compiled_in_place_stays_so(model):
    model.compile(backend=rewritten)
    expected = model.twice(X)
    own = model._compiled_call_impl
    assert torch.equal(torch.compile(model, backend=rewritten).twice(X), expected)
    assert model._compiled_call_impl is own


# ---- transformers


def text(model, **options):
    say = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(PROMPT, **say)


CACHES = {
    "static": {"cache_implementation": "static"},
    "dynamic": {},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("how", CACHES)
def test_generate(how):
    model, _, _ = adapted("llama", budget=0.5)
    dense = text(model, **CACHES[how])
    got = text(torch.compile(model, backend=rewritten, dynamic=True), **CACHES[how])
    model.compile(backend=rewritten, dynamic=True)
    assert torch.equal(got, text(model, **CACHES[how]))
    assert not torch.equal(got, dense)


def test_generate_with_an_assistant():
    """What the assistant proposes is only kept where the model would have said it."""
    model, _, _ = adapted("llama", budget=0.5)
    assistant, _, _ = adapted("llama", budget=0.7)
    fast = torch.compile(model, backend=rewritten, dynamic=True)
    got = text(fast, assistant_model=torch.compile(assistant, backend=rewritten, dynamic=True))
    assert torch.equal(got, text(fast))
    assert not torch.equal(got, text(model))


def test_generate_with_a_sliding_window():
    torch.manual_seed(0)
    config = hf.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=4, initializer_range=0.3,
    )  # fmt: skip
    model = hf.MistralForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(3, 93, (4, 32))} for _ in range(4)]
    rana_fx.adapt(model, batches, budget=0.5, recipe="paper", progress=False)
    got = text(torch.compile(model, backend=rewritten, dynamic=True))
    dense = text(model)
    model.compile(backend=rewritten, dynamic=True)
    assert torch.equal(got, text(model)) and not torch.equal(got, dense)


def test_generate_while_transformers_compiles_calls_by_itself():
    """As it does on a GPU, with a static cache: what it compiles is the call, and the plan stays in it."""
    model, _, _ = adapted("llama", budget=0.5)
    config, seen = hf.CompileConfig(backend=lambda gm, _: seen.append(gm) or gm.forward, mode=None), []
    config._compile_all_devices = True
    fast = torch.compile(model, backend=rewritten, dynamic=True)
    got = text(fast, cache_implementation="static", compile_config=config)
    assert seen == []
    assert torch.equal(got, text(fast, cache_implementation="static"))


# ---- parts that a method calls by themselves


class Tower(nn.Module):
    """Blocks and a projection that ``encode`` calls one by one, as models with an encoder do when they generate."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Model() for _ in range(2))

    def encode(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.encode(x).sum(-1)


class CallsAnother(Model):
    """Its class has a ``__call__`` of its own, as transformers' layers with gradient checkpointing."""

    def __call__(self, *args):
        return super().__call__(*args)


@pytest.mark.parametrize("kind", [Model, CallsAnother])
def test_parts_that_a_method_calls_run_compiled(kind):
    torch.manual_seed(0)
    tower = Tower().requires_grad_(False)
    for block in tower.blocks:
        block.__class__ = kind
    rana_fx.adapt(tower, [torch.randn(200, 16)], budget=0.6, recipe="static", progress=False)
    fast = torch.compile(tower, backend=rewritten)
    dense, adapted_sum = tower.encode(X), fast(X)
    assert relative(fast.encode(X).sum(-1), adapted_sum) < 100 * EPS
    assert relative(dense.sum(-1), adapted_sum) > 1e-3
    assert torch.equal(tower.encode(X), dense)
    assert not [part for part in tower.modules() if "_compiled_call_impl" in vars(part)]


def test_hooks_on_a_part_are_inlined_where_it_is_called_in_compiled_code(model):
    """With a hook Dynamo reads what a module calls itself by; that must not break the graph."""
    model.linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    graphs = []
    counted = functools.wraps(rewritten)(lambda gm, inputs: graphs.append(gm) or rewritten(gm, inputs))
    counted.func = rewritten
    fast = torch.compile(model, backend=counted, fullgraph=True)
    got, first = fast.twice(X), len(graphs)
    assert torch.equal(got, fast(fast(X))) and torch.equal(got, fast.twice(X)) and torch.equal(got, fast.twice(X))
    assert first == 1 and len(graphs) == 2  # one more of the call from outside


def test_a_compiled_layer_lies_in_a_compiled_model():
    """Dynamo reads how attributes of the inner wrapper are looked up."""
    tower = Tower().requires_grad_(False)
    expected = tower(X)
    tower.blocks[1] = torch.compile(tower.blocks[1], backend="eager")
    assert torch.equal(torch.compile(tower, backend="eager")(X), expected)


def test_a_method_is_looked_up_while_another_thread_compiles(model, monkeypatch):
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    fast = torch.compile(model, backend=rewritten)
    assert fast.twice.__func__ is not Model.twice


def test_generate_runs_the_encoder_compiled():
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=None, initializer_factor=3.0,
    )  # fmt: skip
    model = hf.T5ForConditionalGeneration(config).eval().requires_grad_(False)
    batches = [{"input_ids": torch.randint(3, 93, (4, 32)), "decoder_input_ids": torch.randint(3, 93, (4, 8))} for _ in range(4)]
    rana_fx.adapt(model, batches, budget=0.6, recipe="paper", progress=False)
    fast = torch.compile(model, backend=rewritten)
    say = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    mask = torch.ones_like(PROMPT)
    encoded = fast(input_ids=PROMPT, attention_mask=mask, decoder_input_ids=PROMPT[:, :1]).encoder_last_hidden_state
    got = fast.generate(PROMPT, attention_mask=mask, **say).encoder_hidden_states[-1]
    dense = model.generate(PROMPT, attention_mask=mask, **say).encoder_hidden_states[-1]
    assert relative(got, encoded) < 100 * EPS and relative(dense, encoded) > 1e-2
