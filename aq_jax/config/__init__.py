"""The configs of a user: the numerics of one tensor, the policy of a model, a whole conversion.

QuantSpec             one tensor's numerics: bits, granularity, rotation
QuantizationConfig    the spec and the quantizer of each tensor, by name
CalibrationConfig     the text on which calibrated quantizers run the model
AllocationConfig      the bits a weight, or the quality, for which widths are chosen
TrainingConfig        the length of the training of calibrated weights
ShardsConfig          the memory and the processes that write a folder of tables
ConversionConfig      source, output and the above: the contents of a TOML file (`config.schema`)
"""

from aq_jax.config.calibration import AllocationConfig, CalibrationConfig, TrainingConfig
from aq_jax.config.conversion import Compression, ConversionConfig, ShardsConfig
from aq_jax.config.quantization import Override, QuantizationConfig, widths
from aq_jax.config.spec import QuantSpec

__all__ = [
    "AllocationConfig",
    "CalibrationConfig",
    "Compression",
    "ConversionConfig",
    "Override",
    "QuantSpec",
    "QuantizationConfig",
    "ShardsConfig",
    "TrainingConfig",
    "widths",
]
