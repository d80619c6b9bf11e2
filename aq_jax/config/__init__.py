"""What a user may ask for: the numerics of one tensor, the policy of a model, a whole conversion.

QuantSpec             how one tensor lies on its grid (bits, granularity, rotation)
QuantizationConfig    which spec, which quantizer, for which names
CalibrationConfig     on which text calibrated quantizers run the model
AllocationConfig      how many bits a weight, or how good a model, widths are chosen for
TrainingConfig        how long calibrated weights are trained
ShardsConfig          in which memory, and by whom, a folder of tables is written
ConversionConfig      source, output and the above: what a TOML file holds (`configfile`)
"""

from aq_jax.config.calibration import AllocationConfig, CalibrationConfig, TrainingConfig
from aq_jax.config.conversion import Compression, ConversionConfig, Engine, ShardsConfig, parse_bytes
from aq_jax.config.quantization import (
    LARGEST_ROTATION,
    Override,
    QuantizationConfig,
    QuantSpec,
    widths,
)

__all__ = [
    "LARGEST_ROTATION",
    "AllocationConfig",
    "CalibrationConfig",
    "Compression",
    "ConversionConfig",
    "Engine",
    "Override",
    "QuantSpec",
    "QuantizationConfig",
    "ShardsConfig",
    "TrainingConfig",
    "parse_bytes",
    "widths",
]
