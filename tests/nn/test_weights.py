"""Names to places: everything that does not fit is said, all of it, by name."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import aq_jax as aq
from aq_jax.config.fields import Fields
from aq_jax.nn.layers import QEmbed, QLinear
from aq_jax.nn.weights import NameRule, fill, keep, transpose


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.word = nnx.Embed(12, 8, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])


NAMES: tuple[NameRule, ...] = (
    (r"words", "word.embedding", keep),
    (r"h\.(\d+)\.w", r"blocks.\1.up.kernel", transpose),
    (r"h\.(\d+)\.b", r"blocks.\1.up.bias", keep),
    (r"h\.(\d+)\.(?:g|gamma)", r"blocks.\1.norm.scale", keep),
    (r"h\.(\d+)\.beta", r"blocks.\1.norm.bias", keep),
    (r"head\..*", None, keep),
)


def abstract() -> Model:
    return nnx.eval_shape(lambda: Model(nnx.Rngs(0)))


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"words": (12, 8)}
    for i in range(2):
        shapes |= {f"h.{i}.w": (16, 8), f"h.{i}.b": (16,), f"h.{i}.g": (16,), f"h.{i}.beta": (16,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_every_tensor_comes_to_its_place() -> None:
    given = tensors() | {"head.anything": np.zeros((3, 3, 3), np.float32)}
    model = fill(abstract(), given, NAMES, None, "file")
    np.testing.assert_array_equal(model.word.embedding.get_value(), given["words"])
    for i, block in enumerate(model.blocks):
        np.testing.assert_array_equal(block.up.kernel.get_value(), given[f"h.{i}.w"].T)
        np.testing.assert_array_equal(block.up.bias.get_value(), given[f"h.{i}.b"])
        np.testing.assert_array_equal(block.norm.scale.get_value(), given[f"h.{i}.g"])
        np.testing.assert_array_equal(block.norm.bias.get_value(), given[f"h.{i}.beta"])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_quantized_weights_take_their_layer_s_place_with_its_bias() -> None:
    given = tensors()
    q = {name: aq.quantize(array, "int8") for name, array in given.items() if array.ndim == 2}
    model = fill(abstract(), given | q, NAMES, "bfloat16", "file")
    assert type(model.word) is QEmbed
    ids = jnp.array([3, 11])
    np.testing.assert_array_equal(model.word(ids), aq.qembed(q["words"], ids))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)), jnp.float32)
    for i, block in enumerate(model.blocks):
        assert type(block.up) is QLinear
        assert block.up.activations == "bfloat16"
        wanted = aq.qdot(x, q[f"h.{i}.w"], "bfloat16") + given[f"h.{i}.b"]
        np.testing.assert_allclose(block.up(x), wanted, atol=1e-6)


def test_what_is_quantized_but_no_weight_of_a_layer_is_dequantized() -> None:
    q = aq.quantize(tensors()["h.0.b"].reshape(2, 8), "int8")
    names = (
        *(mapped for mapped in NAMES if not mapped[0].endswith("b")),
        (r"h\.(\d+)\.b", r"blocks.\1.up.bias", jnp.ravel),
    )
    model = fill(abstract(), tensors() | {"h.0.b": q}, names, None, "file")
    np.testing.assert_array_equal(model.blocks[0].up.bias.get_value(), aq.dequantize(q).ravel())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_models_compute_in_float32_whatever_was_stored(dtype: str) -> None:
    stored = {name: np.asarray(jnp.asarray(array, "bfloat16")).astype(dtype) for name, array in tensors().items()}
    model = fill(abstract(), stored, NAMES, None, "file")
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(model.word.embedding.get_value(), stored["words"].astype(np.float32))


def refused(given: dict, names: tuple[NameRule, ...] = NAMES) -> list[str]:
    """The complaints, one by one."""
    with pytest.raises(aq.FormatError) as caught:
        fill(abstract(), given, names, None, "some/file.parquet")
    head, _, rest = str(caught.value).partition(" tensors do not fit the model: ")
    complaints = rest.split("; ")
    assert head == f"some/file.parquet: {len(complaints)}"
    return complaints


def test_everything_that_is_wrong_is_named_at_once() -> None:
    given = tensors()
    given["h.0.extra"] = given["h.0.b"]  # unmatched
    given["xwords"] = given["words"]  # a part of a name is no match
    given["h.1.gamma"] = given["h.1.g"]  # a second one for the same place
    given["h.2.w"] = given["h.1.w"]  # of a layer that is not there
    del given["h.1.beta"], given["h.0.b"]
    given["h.0.w"] = given["h.0.w"].T
    given["words"] = given["words"][:-1]
    assert refused(given) == [
        "blocks.0.up.bias: no tensor fills it",
        "blocks.1.norm.bias: no tensor fills it",
        "h.0.extra: matches no pattern",
        "h.0.w: shape [16, 8] does not fit blocks.0.up.kernel, which wants [8, 16]",
        "h.1.gamma: fills blocks.1.norm.scale, and so does h.1.g",
        "h.2.w: the model has no blocks.2.up.kernel",
        "words: shape [11, 8] does not fit word.embedding, which wants [12, 8]",
        "xwords: matches no pattern",
    ]


def test_a_name_that_two_patterns_match_is_refused() -> None:
    names = (*NAMES, (r"h\.0\.[wb]", None, keep))
    assert refused(tensors(), names) == [
        "blocks.0.up.bias: no tensor fills it",
        "blocks.0.up.kernel: no tensor fills it",
        "h.0.b: matches 2 patterns",
        "h.0.w: matches 2 patterns",
    ]


def test_quantized_shapes_are_told_as_the_model_has_them() -> None:
    given = tensors()
    wrong = {"h.0.w": aq.quantize(given["h.0.w"].T, "int8"), "words": aq.quantize(given["words"][:4], "int8")}
    assert refused(given | wrong) == [
        "h.0.w: shape [16, 8] does not fit blocks.0.up.kernel, which wants [8, 16]",
        "words: shape [4, 8] does not fit word.embedding, which wants [12, 8]",
    ]


def test_an_empty_table_lacks_everything() -> None:
    assert len(refused({})) == 9


def read(**given: object) -> tuple:
    fields = Fields(given, "a/config.json")
    found = (
        fields.take("size", int), fields.take("eps", float, 1e-5), fields.choose("act", ("relu", "gelu"), "relu"),
        fields.take("bias", bool, False), fields.take("head", int, None),
    )  # fmt: skip
    fields.require(kind="plain")
    fields.leave("name")
    fields.finish()
    return found


def test_fields_are_read_and_null_is_as_if_they_were_not_there() -> None:
    assert read(size=3) == (3, 1e-5, "relu", False, None)
    assert read(size=3, eps=1, act="gelu", bias=True, head=2, name=[{}]) == (3, 1.0, "gelu", True, 2)
    assert type(read(size=3, eps=1)[1]) is float
    assert read(size=3, head=None, kind=None, eps=None, other=None) == read(size=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no size; wanted a positive integer"),
        ({"size": None}, "no size; wanted a positive integer"),
        ({"size": 0}, "size is 0; wanted a positive integer"),
        ({"size": -3}, "size is -3; wanted a positive integer"),
        ({"size": 2**31}, "size is 2147483648; wanted a positive integer"),
        ({"size": 3.0}, r"size is 3\.0; wanted a positive integer"),
        ({"size": True}, "size is True; wanted a positive integer"),
        ({"size": "3"}, "size is '3'; wanted a positive integer"),
        ({"size": 3, "eps": "small"}, "eps is 'small'; wanted a positive number"),
        ({"size": 3, "eps": math.nan}, "eps is nan; wanted a positive number"),
        ({"size": 3, "eps": -math.inf}, "eps is -inf; wanted a positive number"),
        ({"size": 3, "eps": 10**400}, "eps is 10+; wanted a positive number"),
        ({"size": 3, "bias": 1}, "bias is 1; wanted true or false"),
        ({"size": 3, "act": "silu"}, "act is 'silu'; wanted 'relu' or 'gelu'"),
        ({"size": 3, "act": ["relu"]}, r"act is \['relu'\]; wanted a string"),
        ({"size": 3, "kind": "fancy"}, "kind is 'fancy'; wanted 'plain'"),
        ({"size": 3, "head": 0}, "head is 0; wanted a positive integer"),
        ({"size": 3, "turbo": 1}, "has turbo = 1, which is not known here"),
        ({"size": 3, "turbo": 1, "eels": [2]}, r"has eels = \[2\], turbo = 1, which are not known here"),
    ],
)
def test_fields_that_cannot_be_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(aq.FormatError, match=f"^a/config.json: {message}$"):
        read(**fields)
