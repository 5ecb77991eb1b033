"""What a plan records of the linears of a layout: name, role, sizes and the digest of each weight."""

from __future__ import annotations

from rana_fx.calibration.layout import Layout
from rana_fx.plan import SiteRecord, weight_digest


def records(layout: Layout, *, hashed: bool = True) -> tuple[SiteRecord, ...]:
    """The fingerprint of every linear; unless ``hashed``, without the digest of its weight."""
    return tuple(
        SiteRecord(
            site.name, site.role, site.op, site.out_features, site.in_features, site.transposed, site.uses, site.counted,
            str(site.weight.dtype).removeprefix("torch."), weight_digest(site.weight) if hashed else "",
        )
        for site in layout.sites.values()
    )  # fmt: skip
