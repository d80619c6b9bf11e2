"""Writes the checkpoints in this folder with the packers of those who store weights so, and what they read of them.

`python tests/golden/schemes/make.py NAME`, where NAME's package can be imported. They are committed;
expected.safetensors holds the weights as the package itself dequantizes them, and config.json names its release.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

FOLDER = Path(__file__).parent
Tensors = dict[str, torch.Tensor]


def write(name: str, tensors: Tensors, expected: Tensors, config: dict[str, Any], metadata: Any = None) -> None:
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    metadata = {"format": "pt"} | (metadata or {})
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata)
    safetensors.torch.save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compressed_tensors(name: str = "compressed-tensors", widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)) -> None:
    """A layer of each width and granularity; a float weight, and one that is ignored."""
    import compressed_tensors
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams

    try:
        from compressed_tensors.compressors.quantized_compressors.pack_quantized import unpack_from_int32
    except ImportError:
        unpack_from_int32 = None

    groups: dict[str, Any] = {}
    tensors: Tensors = {"norm.weight": normal(64, seed=1)}
    expected: Tensors = dict(tensors)

    def add(layer: str, form: str, dtype: torch.dtype, seed: int, target: str, **more: Any) -> None:
        args = QuantizationArgs(**more)
        scheme = QuantizationScheme(targets=[target], weights=args, format=form)
        w = normal(10, 64, seed=seed, dtype=dtype)
        size = {"tensor": 640, "channel": 64, "group": more.get("group_size"), "block": 0}[more["strategy"]]
        if size:
            rows = w.reshape(-1, size) if size > 64 else w.reshape(10, -1, size)
            low, high = rows.amin(-1), rows.amax(-1)
        else:
            blocks = w.reshape(2, 5, 2, 32).permute(0, 2, 1, 3).reshape(2, 2, -1)
            low, high = blocks.amin(-1), blocks.amax(-1)
        scale, zero = calculate_qparams(low, high, args)
        state = {"weight": w, "weight_scale": scale.to(dtype)} | ({} if args.symmetric else {"weight_zero_point": zero})
        compressor = BaseCompressor.get_value_from_registry(form)
        if hasattr(compressor, "compress_weight"):  # releases before 0.15
            packed = compressor().compress_weight(w, state["weight_scale"], args, state.get("weight_zero_point"))
            codes = unpack_from_int32(packed["weight_packed"], args.num_bits, w.shape)
            value = dequantize(codes, state["weight_scale"], state.get("weight_zero_point"), args)
            packed["weight_scale"] = state["weight_scale"]
        else:
            packed = compressor.compress(state, scheme)
            value = compressor.decompress(packed, scheme)["weight"]
        tensors.update({f"{layer}.{leaf}": part for leaf, part in packed.items()})
        expected[f"{layer}.weight"] = value
        groups[f"group_{len(groups)}"] = json.loads(scheme.model_dump_json())

    pack = "pack-quantized"
    for bits in widths:
        half = torch.float16 if bits % 2 else torch.bfloat16
        group = {"num_bits": bits, "strategy": "group", "group_size": 32}
        add(f"m.{bits}.symmetric", pack, half, bits, rf"re:.*\.{bits}\.symmetric", symmetric=True, **group)
        add(f"m.{bits}.other", pack, half, 10 + bits, rf"re:.*\.{bits}\.other", symmetric=False, **group)
        channel = {"num_bits": bits, "strategy": "channel"}
        add(f"m.{bits}.row", pack, torch.float32, 20 + bits, f"m.{bits}.row", symmetric=False, **channel)
    tensors["lm_head.weight"] = expected["lm_head.weight"] = normal(7, 64, seed=2, dtype=torch.bfloat16)
    if name == "compressed-tensors":
        int8 = {"num_bits": 8, "strategy": "channel"}
        add("m.int8", "int-quantized", torch.bfloat16, 30, "m.int8", symmetric=True, **int8)
        add("m.int8z", "int-quantized", torch.float16, 31, "m.int8z", symmetric=False, **int8)
        add("m.int8t", "int-quantized", torch.float32, 32, "m.int8t", symmetric=True, num_bits=8, strategy="tensor")
        for number, more in enumerate(
            ({"strategy": "channel"}, {"strategy": "tensor"}, {"strategy": "block", "block_structure": [5, 32]})
        ):
            layer = f"m.float8.{number}"
            add(layer, "float-quantized", torch.bfloat16, 40 + number, layer, num_bits=8, type="float", **more)
    config = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups,
        "ignore": ["lm_head"], "version": compressed_tensors.__version__,
    }  # fmt: skip
    write(name, tensors, expected, {"model_type": "none", "quantization_config": config})


def gptq(version: int) -> None:
    """A layer of each width with zero points, in one version of the format, packed and read by GPTQModel."""
    import gptqmodel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    tensors: Tensors = {"norm.weight": normal(64, seed=1)}
    expected: Tensors = dict(tensors)
    bits_of: dict[str, Any] = {}
    for bits in (2, 3, 4, 8):
        for size in (32, 64):
            name = f"m.{bits}.{size}"
            linear = torch.nn.Linear(64, 32, bias=size == 32)
            linear.weight.data = normal(32, 64, seed=bits + size)
            if size == 32:
                linear.bias.data = normal(32, seed=bits)
            w = linear.weight.data.reshape(32, -1, size)
            low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
            scales = (high - low) / (2**bits - 1)
            # A zero point of 0 is what the first version cannot add in words: it is stored as the largest.
            zeros = torch.round(-low / scales).clamp(min=version == 1)
            layer = TorchLinear(bits, size, False, False, 64, 32, bias=size == 32, dtype=torch.float16)
            layer.pack_original(linear, scales, zeros, torch.arange(64, dtype=torch.int32) // size)
            layer.qzero_format(format=2)
            layer._init_wf_unsqueeze_buffers()
            expected[f"{name}.weight"] = layer.dequantize_weight().T
            if version == 1:
                config = type("Config", (), {"bits": bits, "pack_dtype": torch.int32})
                convert_gptq_v2_to_v1_format_module(layer, config)
            for leaf in ("qweight", "qzeros", "scales", "g_idx", "bias"):
                if (value := getattr(layer, leaf, None)) is not None:
                    tensors[f"{name}.{leaf}"] = value
            if size == 32:
                expected[f"{name}.bias"] = layer.bias
            bits_of[f"+:{name}"] = {"bits": bits, "group_size": size}
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False, "dynamic": bits_of,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "meta": {"quantizer": [f"gptqmodel:{gptqmodel.__version__}"]},
    }  # fmt: skip
    write(f"gptq-v{version}", tensors, expected, {"model_type": "none", "quantization_config": config})


def awq() -> None:
    """Two layers of four bits, packed and read by AutoAWQ."""
    import awq
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    tensors: Tensors = {"norm.weight": normal(64, seed=1)}
    expected: Tensors = dict(tensors)
    for name, rows in (("m.a", 32), ("m.b", 64)):
        linear = torch.nn.Linear(64, rows, bias=False)
        linear.weight.data = normal(rows, 64, seed=rows)
        w = linear.weight.data.reshape(rows, 2, 32)
        scales = (w.amax(-1) - w.amin(-1)).clamp(min=1e-5) / 15
        zeros = (-torch.round(w.amin(-1) / scales)).clamp(0, 15)
        layer = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        tensors |= {f"{name}.{leaf}": getattr(layer, leaf) for leaf in ("qweight", "qzeros", "scales")}
        expected[f"{name}.weight"] = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32).T
    config = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None, "quantizer": f"autoawq:{awq.__version__}",
    }  # fmt: skip
    write("awq", tensors, expected, {"model_type": "none", "quantization_config": config})


def mlx() -> None:
    """A layer of each width and of each dtype, packed and read by MLX."""
    import mlx.core as mx
    import numpy as np

    tensors: Tensors = {"norm.weight": normal(64, seed=1)}
    expected: Tensors = dict(tensors)
    own: dict[str, Any] = {}
    for bits in (2, 3, 4, 5, 6, 8):
        for kind, dtype in (("float16", mx.float16), ("float32", mx.float32)):
            name, size = f"m.{bits}.{kind}", 32 if bits % 2 else 64
            w = mx.array(normal(8, 128, seed=bits).numpy()).astype(dtype)
            w[3] = 0
            parts = mx.quantize(w, group_size=size, bits=bits)
            for leaf, value in zip(("weight", "scales", "biases"), parts, strict=True):
                tensors[f"{name}.{leaf}"] = torch.from_numpy(np.array(value))
            wide = (part.astype(mx.float32) for part in parts[1:])
            value = mx.dequantize(parts[0], *wide, group_size=size, bits=bits)
            expected[f"{name}.weight"] = torch.from_numpy(np.array(value)).to(getattr(torch, kind))
            own[name] = {"group_size": size, "bits": bits}
    config = {"group_size": 64, "bits": 4, "mode": "affine"} | own
    fields = {"model_type": "none", "mlx": mx.__version__, "quantization": config, "quantization_config": config}
    write("mlx", tensors, expected, fields)


def hqq() -> None:
    """A layer of each width, of floats of 16 and 32 bits, packed and read by HQQ."""
    import hqq
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    tensors: Tensors = {"norm.weight": normal(64, seed=1)}
    expected: Tensors = dict(tensors)
    for bits in (2, 3, 4, 5, 6, 8):
        for kind in (torch.float16, torch.float32):
            name = f"m.{bits}.{str(kind).removeprefix('torch.')}"
            linear = torch.nn.Linear(64, 20, bias=bits == 2)
            linear.weight.data = normal(20, 64, seed=bits)
            if bits == 2:
                linear.bias.data = normal(20, seed=3)
            config = BaseQuantizeConfig(nbits=bits, group_size=32, axis=1, view_as_float=bits == 8)
            layer = HQQLinear(linear, config, compute_dtype=kind, device="cpu")
            for leaf, value in layer.state_dict().items():
                tensors[f"{name}.{leaf}"] = value.data
            expected[f"{name}.weight"] = layer.dequantize()
            if bits == 2:
                expected[f"{name}.bias"] = layer.bias
    config = {"quant_method": "hqq", "quant_config": {"version": hqq.__version__}, "skip_modules": ["lm_head"]}
    write("hqq", tensors, expected, {"model_type": "none", "quantization_config": config})


def bitsandbytes() -> None:
    """nf4 and fp4, nested and not, one that ends inside a block, one with a block of zeros; and int8."""
    import bitsandbytes
    from bitsandbytes import functional

    tensors: Tensors = {"norm.weight": normal(64, seed=1)}
    expected: Tensors = dict(tensors)
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                name = f"m.{kind}.{'nested' if nested else 'plain'}.{str(dtype).removeprefix('torch.')}"
                w = normal(*((7, 90) if dtype == torch.float32 else (10, 64)), seed=len(name), dtype=dtype)
                if dtype == torch.float16:
                    w[3] = 0
                codes, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type=kind)
                tensors[f"{name}.weight"] = codes
                tensors |= {f"{name}.weight.{leaf}": value for leaf, value in state.as_dict(packed=True).items()}
                expected[f"{name}.weight"] = functional.dequantize_4bit(codes, state)
    codes, scales, _ = functional.int8_vectorwise_quant(normal(10, 64, seed=9, dtype=torch.float16))
    tensors |= {"m.int8.weight": codes, "m.int8.SCB": scales}
    tensors["m.int8.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    expected["m.int8.weight"] = functional.int8_vectorwise_dequant(codes, scales)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "version": bitsandbytes.__version__}
    fields = {"model_type": "none", "dtype": "float32", "quantization_config": config}
    write("bitsandbytes", tensors, expected, fields)


def torchao() -> None:
    """Plain integers of several widths, packed and read by torchao; Int4Tensor, which needs a GPU, by hand."""
    import torchao
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int4Tensor, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    model = torch.nn.ModuleDict()
    configs: dict[str, Any] = {"int8": Int8WeightOnlyConfig(version=2)}
    for bits in (2, 3, 4, 5, 6, 8):
        mapping = MappingType.ASYMMETRIC if bits % 2 else MappingType.SYMMETRIC
        granularity = PerAxis(0) if bits == 5 else PerGroup(32)
        dtype = getattr(torch, f"int{bits}")
        configs[f"x{bits}"] = IntxWeightOnlyConfig(dtype, granularity=granularity, mapping_type=mapping)
    for seed, (name, config) in enumerate(configs.items()):
        linear = torch.nn.Linear(64, 10, bias=False)
        linear.weight.data = normal(10, 64, seed=seed, dtype=torch.bfloat16)
        model[name] = linear
        quantize_(linear, config)
    state: dict[str, Any] = {f"m.{name}": value for name, value in model.state_dict().items()}
    expected: Tensors = {name: value.dequantize() for name, value in state.items()}
    codes = torch.randint(-8, 8, (10, 64), generator=torch.Generator().manual_seed(7)).to(torch.int8)
    scale, zero = (normal(2, 10, seed=seed, dtype=torch.bfloat16) for seed in (8, 9))
    qdata = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    state["m.int4.weight"] = Int4Tensor(qdata, scale, zero, [1, 32], torch.Size((10, 64)))
    grids = (each.float().T.repeat_interleave(32, dim=1) for each in (scale, zero))
    expected["m.int4.weight"] = torch.addcmul(*reversed((codes.float(), *grids))).to(torch.bfloat16)
    state["norm.weight"] = expected["norm.weight"] = normal(64, seed=1)
    tensors, metadata = flatten_tensor_state_dict(state)
    config = {"quant_method": "torchao", "quant_type": {"default": {}}, "version": torchao.__version__}
    write("torchao", tensors, expected, {"model_type": "none", "quantization_config": config}, metadata)


MAKERS: dict[str, Callable[[], None]] = {
    "compressed-tensors": compressed_tensors,
    "compressed-tensors-0.12": lambda: compressed_tensors("compressed-tensors-0.12", (3, 5)),
    "gptq-v1": lambda: gptq(1),
    "gptq-v2": lambda: gptq(2),
    "awq": awq,
    "mlx": mlx,
    "hqq": hqq,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        MAKERS[name]()
