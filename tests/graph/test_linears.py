"""Linears, groups, blocks and stacks are found by dataflow. Counts per architecture: tests/integration/test_architectures.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rana_fx
from rana_fx.calibration.calibrate import calibrate
from rana_fx.errors import NoLinears
from tests.support.architectures import ARCHITECTURES, build, make
from tests.support.further_architectures import FURTHER

EVERY = ARCHITECTURES | FURTHER


REPLAYED = ["plain_llama", "gpt2", "falcon", "t5", "nn_encoder", "plain", "apertus", "moshi", "in_place", "packed"]


@pytest.mark.parametrize("name", REPLAYED)
def test_dense_rows_replay_the_block(name):
    """The extracted pointwise part computes the input of the down projection, which a hook records, on the same tokens."""
    from rana_fx.recipes.mlp_rows import hidden_rows
    from rana_fx.recipes.problem import Problem

    model, batch = make(EVERY[name], 1)
    found = calibrate(model, [batch], wanted=lambda layout: {g.sites for g in layout.groups}, progress=False)
    layout = found.layout
    problem = Problem(layout, found.samples, 0.5, "flops", "paper", False)
    for block in layout.blocks:
        replayed = hidden_rows(problem, block, problem.rows(block.ups[0]))
        torch.testing.assert_close(replayed, problem.rows(block.down), rtol=1e-4, atol=1e-5)


def test_roles_and_names():
    model, batch = build("plain_llama", 1)
    layout = calibrate(model, [batch], progress=False).layout
    roles = {name: site.role for name, site in layout.sites.items()}
    prefix = "model.layers.0."
    assert roles == {
        prefix + "self_attn.q_proj": "attention_in",
        prefix + "self_attn.k_proj": "attention_in",
        prefix + "self_attn.v_proj": "attention_in",
        prefix + "self_attn.o_proj": "attention_out",
        prefix + "mlp.gate_proj": "up",
        prefix + "mlp.up_proj": "up",
        prefix + "mlp.down_proj": "down",
        "lm_head": "head",
    }
    assert layout.sites[prefix + "self_attn.k_proj"].out_features == 16


def test_transposed_weights_are_recognised():
    model, batch = build("gpt2", 1)
    layout = calibrate(model, [batch], progress=False).layout
    site = layout.sites["transformer.h.0.attn.c_attn"]
    assert site.transposed
    assert (site.out_features, site.in_features) == (96, 32)


def test_shared_weights_are_one_site_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            for _ in range(2):
                x = x + self.down(torch.relu(self.up(x)))
            return x

    layout = calibrate(Twice(), [torch.randn(3, 8)], progress=False).layout
    assert {name: site.uses for name, site in layout.sites.items()} == {"up": 2, "down": 2}
    assert len(layout.blocks) == 1


def test_expert_weights_are_reported_with_a_reason():
    model, batch = build("mixtral", 1)
    layout = calibrate(model, [batch], progress=False).layout
    assert {skip.site for skip in layout.skips} == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    assert all("4 matrices" in skip.reason for skip in layout.skips)


def test_weights_that_cannot_be_adapted_are_reported_with_a_reason():
    model, batch = make(FURTHER["unusual"], 1)
    layout = calibrate(model, [batch], progress=False).layout
    reasons = {skip.site.removeprefix("blocks.0."): skip.reason for skip in layout.skips}
    assert reasons == {
        "up.parametrizations.weight.original1": "its weight is computed in the forward pass",
        "cast": "its weight is cast in the forward pass",
        "left": "its product with the activation is not one over the last dimension (matmul)",
        "tied": "its weight is also used transposed, and one adapter cannot serve both",
    }


def test_what_reads_no_data_is_outside():
    model, batch = make(FURTHER["xlnet"], 1)
    layout = calibrate(model, [batch], progress=False).layout
    outside = {name.rpartition(".")[2]: site.role for name, site in layout.sites.items() if not site.counted}
    assert outside == {"r": "constant", "word_embedding": "head"}


def test_a_layer_of_the_first_block_is_no_stem():
    model, batch = make(FURTHER["chained"], 2)
    layout = calibrate(model, [batch], progress=False).layout
    roles = [{n.removeprefix(f"blocks.{i}."): s.role for n, s in layout.sites.items() if f".{i}." in n} for i in (0, 1)]
    assert roles[0] == roles[1]
    assert "stem" not in roles[0].values()


def test_a_linear_before_the_blocks_is_a_stem():
    model, batch = make(FURTHER["albert"], 2)
    layout = calibrate(model, [batch], progress=False).layout
    assert {n for n, s in layout.sites.items() if s.role == "stem"} == {"albert.encoder.embedding_hidden_mapping_in"}
    assert layout.sites["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"].uses == 2


def test_a_buffer_that_data_is_written_into_is_data():
    class Scatter(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            hidden = torch.zeros(x.shape[0], 16)
            hidden[:, ::2] = torch.relu(self.up(x))[:, 1::2]
            return x + self.down(hidden)

    layout = calibrate(Scatter(), [torch.randn(3, 8)], progress=False).layout
    assert {name: site.counted for name, site in layout.sites.items()} == {"up": True, "down": True}


def test_attention_whose_weights_are_asked_for_is_reported():
    class Asked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.up = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x):
            mixed, weights = self.attention(x, x, x)
            return x + self.up(mixed) * weights.sum()

    layout = calibrate(Asked(), [torch.randn(2, 3, 8)], progress=False).layout
    assert [skip.site for skip in layout.skips] == ["attention.in_proj_weight", "attention.out_proj"]
    assert all("fused operator" in skip.reason for skip in layout.skips)


def test_model_without_linears():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.gain

    with pytest.raises(NoLinears, match="no linear layer was found in Scale"):
        calibrate(Scale(), [torch.randn(2, 4)], progress=False)


def test_padding_is_not_sampled():
    model, batch = build("plain_llama", 1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:] = 0
    found = calibrate(model, [batch | {"attention_mask": mask}], wanted=lambda layout: {layout.groups[0].sites}, progress=False)
    assert found.tokens == 17
    assert next(iter(found.samples.values())).rows().shape == (17, 32)
    assert found.layout.graphs == 1


def test_rows_of_a_dataset_are_batches_of_one():
    from datasets import Dataset

    model, _ = build("plain_llama", 1)
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "attention_mask": [[1, 1, 1], [1, 0]]})
    found = calibrate(model, rows, wanted=lambda layout: {layout.groups[0].sites}, progress=False)
    assert found.tokens == 4
    assert len(next(iter(found.samples.values())).rows()) == 4


def test_a_write_into_a_copy_is_no_write_into_its_source():
    """Indexing by a tensor copies: linears before and after a write into the copy still read one tensor."""

    class Gathered(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False)
            self.down = nn.Linear(24, 8)

        def forward(self, x):
            up = self.first(x)
            picked = x[torch.arange(2, device=x.device)]
            picked.masked_fill_(picked > 0, 0.0)
            return x + self.down(torch.relu(up) * self.second(x)) + picked.sum()

    report = rana_fx.explain(Gathered(), torch.randn(4, 8))
    assert (report.sites, report.groups, report.blocks) == (3, 2, 1)
