"""The budget counts the linears of the blocks: not the output head."""

from __future__ import annotations

from rana_fx.calibration.calibrate import calibrate
from tests.support.architectures import build


def test_the_head_is_outside_of_the_budget():
    model, batch = build("plain_llama", 1)
    layout = calibrate(model, [batch], progress=False).layout
    assert {name for name, site in layout.sites.items() if not site.counted} == {"lm_head"}
