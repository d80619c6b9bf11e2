"""List the widths that a tensor may have: each code of a config's list, with grids that the code can have."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import numpy as np

from aq_jax.calibration.row_scales import is_trainable
from aq_jax.codes import CODES
from aq_jax.config import AllocationConfig, Override, QuantizationConfig
from aq_jax.config.quantization import widths
from aq_jax.errors import ConfigError
from aq_jax.quantizers.lookup import calibrated_quantizer, find_quantizer
from aq_jax.quantizers.treatment import Treatment, treat


@dataclass(frozen=True)
class Option:
    """One width that a tensor may have.

    Args:
        width: The width, as the config names it; "" if the config fixes the tensor's.
        override: The override that sets it; None if the config fixes it.
        treatment: What becomes of the tensor then.
    """

    width: str
    override: Override | None
    treatment: Treatment


def calibrated_widths(config: QuantizationConfig, trained: bool = False) -> tuple[str, ...]:
    """List the codes that a quantizer chooses on the running model, and that training takes, if it follows.

    >>> calibrated_widths(QuantizationConfig("int4", group_size=64, solver="gptq"))[:3]
    ('int8', 'int6', 'int5')
    """

    def solved(width: str) -> bool:
        override = _override(config, Override(""), "", width)
        try:
            return calibrated_quantizer(dataclasses.replace(config, overrides=(override,)).for_tensor("")) is not None
        except ConfigError:  # a code that has no quantizer
            return False

    return tuple(width for width in widths() if solved(width) and (is_trainable(CODES[width]) or not trained))


def width_options(
    name: str, path: str, shape: tuple[int, ...], dtype: np.dtype, config: QuantizationConfig, goal: AllocationConfig
) -> list[Option]:
    """List a tensor's options: one for each width, or the only one that the config leaves.

    Raises:
        ConfigError: for grids that the tensor's quantizer does not have.
    """
    policy = config.for_tensor(name)
    matching = next((o for o in config.overrides if re.search(o.pattern, name)), None)
    fixed = policy.quant_type != config.quant_type or (matching is not None and matching.quant_type is not None)
    used = path.endswith(".embedding") or (path.startswith("layers.") and path.endswith(".kernel"))
    if fixed or not used or calibrated_quantizer(policy) is None:
        return [Option("", None, treat(config, name, shape, dtype))]
    found = []
    for width in goal.widths:
        override = _override(config, matching or Override(""), f"^{re.escape(name)}$", width)
        own = treat(dataclasses.replace(config, overrides=(override,)), name, shape, dtype)
        if own.spec is not None and (quantizer := calibrated_quantizer(own.policy)) is not None:
            quantizer.check(own.spec, shape, name)
        found.append(Option(width, override, own))
    return found


def _override(config: QuantizationConfig, base: Override, pattern: str, width: str) -> Override:
    """Set a width for one tensor, and what of the config's grids its code cannot have."""
    if width not in CODES:
        return Override(pattern, width)
    code = CODES[width]
    wide = code.bits >= 8  # a scale a channel is enough, and zero points gain nothing
    override = dataclasses.replace(
        base, pattern=pattern, quant_type=width,
        symmetric=True if wide or not code.zero_points else base.symmetric,
        rotate=base.rotate if code.rotated_name else False,
        solver=base.solver if base.solver is None or find_quantizer(base.solver).supports(code) else None,
    )  # fmt: skip
    channels = dataclasses.replace(override, per_channel=True, group_size=None)
    if wide:
        return channels
    try:
        dataclasses.replace(config, overrides=(override,))
    except ConfigError:  # other grids than the config's
        return channels
    return override
