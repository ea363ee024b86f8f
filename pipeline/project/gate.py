"""The verdict of an evaluation on its models, in a few words."""

from collections.abc import Mapping
from typing import Any

PASSED = "passed"


def badge(manifest: Mapping[str, Any], variant: str | None = None) -> str | None:
    """ "passed" or "failed: 2 limits" by an evaluation's manifest; of one variant, or of all.

    None if there were no limits, or none for this variant. The manifest may come from elsewhere.
    """
    gate: Any = manifest.get("gate")
    try:
        if variant is not None and variant not in gate["variants"]:
            return None
        broken = [one for one in gate["broken"] if variant in (None, one["variant"])]
    except (TypeError, KeyError):
        return None
    return f"failed: {len(broken)} limit{'s' * (len(broken) > 1)}" if broken else PASSED
