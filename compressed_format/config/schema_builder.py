"""JSON Schema of hand-written configs, so that an editor completes and checks them.

Keys, values and descriptions come from the models. The rules across fields stand here once more, as far as JSON
Schema can say them; a test compares both on many wrong configs.
"""

from __future__ import annotations

from typing import Any

from compressed_format.config.args import QuantizationArgs
from compressed_format.config.config import QuantizationConfig
from compressed_format.config.kinds import thaw
from compressed_format.config.model import Model, kind_of
from compressed_format.config.scheme import QuantizationScheme
from compressed_format.config.sparsity import MoESparsityConfig, SparsityConfig
from compressed_format.config.transform import TransformArgs, TransformConfig, TransformScheme

__all__ = ["json_schema"]

_Schema = dict[str, Any]

_PARTS: tuple[type[Model], ...] = (
    MoESparsityConfig,
    QuantizationArgs,
    QuantizationScheme,
    SparsityConfig,
    TransformArgs,
    TransformConfig,
    TransformScheme,
)
_WORD: _Schema = {"type": "string"}
_GROUPED = ["group", "tensor_group"]
_UNGROUPED = ["tensor", "channel", "block", "token", "attn_head"]
_ACTIVATIONS = ["token", "tensor", "group", "tensor_group", "attn_head"]


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what :meth:`QuantizationConfig.from_file` reads."""
    schema = _object(QuantizationConfig)
    schema["properties"] = {
        "$schema": {"type": "string", "description": "Where this schema is, for editors; it means nothing else."}
    } | schema["properties"]
    schema["anyOf"] = [
        {"required": ["config_groups"]},
        *(
            _given(key, {"type": "object", "minProperties": 1})
            for key in ("kv_cache_scheme", "sparsity_config", "transform_config")
        ),
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compressed_format configuration",
        "description": "How the modules of a model are compressed.",
        **schema,
        "$defs": {part.__name__: _object(part) for part in _PARTS},
    }


def _object(model: type[Model]) -> _Schema:
    properties = {}
    required = []
    for name, field in model.model_fields.items():
        if name in model.derived:
            continue
        schema = kind_of(field).schema() | {"description": field.description}
        if field.is_required():
            required.append(name)
        elif field.get_default() is not None:
            schema["default"] = thaw(field.get_default())
        properties[name] = schema | _ROLES.get((model, name), {})
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        schema["required"] = required
    if model in _RULES:
        schema["allOf"] = _RULES[model]
    return schema


def _given(key: str, schema: _Schema) -> _Schema:
    """The key is there, and its value is such."""
    return {"properties": {key: schema}, "required": [key]}


def _when(condition: _Schema, consequence: _Schema) -> _Schema:
    return {"if": condition, "then": consequence}


def _strategy(*names: str) -> _Schema:
    return _given("strategy", {"enum": list(names)})


_NO_STRATEGY: _Schema = {"not": _given("strategy", _WORD)}
_NO_CHANNEL_BY_SIZE: _Schema = _when(_NO_STRATEGY, {"properties": {"group_size": {"not": {"const": -1}}}})
_FLOAT = _given("type", {"const": "float"})


def _args_rules() -> list[_Schema]:
    is_dynamic = _given("dynamic", {"enum": [True, "local"]})
    by_group_size = {"allOf": [_NO_STRATEGY, _given("group_size", {"type": "integer", "minimum": 1})]}
    zero_point = {
        "if": _FLOAT,
        "then": {"properties": {"zp_dtype": {"enum": ["torch.float8_e4m3fn", "float8_e4m3fn"]}}},
        "else": {"properties": {"zp_dtype": {"enum": ["torch.int8", "int8"]}}},
    }
    return [
        {"properties": {"group_size": {"not": {"const": 0}}}},
        {
            "if": _FLOAT,
            "then": {"properties": {"num_bits": {"enum": [4, 6, 8]}}},
            "else": {"properties": {"num_bits": {"minimum": 1, "maximum": 8}}},
        },
        _when(_strategy("token"), _given("dynamic", {"const": True})),
        _when(_strategy(*_GROUPED), _given("group_size", {"type": "integer", "minimum": 1})),
        _when(_strategy(*_UNGROUPED), {"properties": {"group_size": {"enum": [None, -1]}}}),
        _when(_strategy("block"), _given("block_structure", {"type": ["array", "string"]})),
        _when(_given("block_structure", {"type": ["array", "string"]}), _strategy("block")),
        _when(
            is_dynamic,
            {
                "properties": {"strategy": {"enum": ["token", "tensor", *_GROUPED, None]}},
                "allOf": [_NO_CHANNEL_BY_SIZE],
            },
        ),
        _when(_given("dynamic", {"const": "local"}), _strategy("tensor_group")),
        _when(_given("actorder", _WORD), {"anyOf": [_strategy("group"), by_group_size]}),
        _when(
            {"allOf": [_given("symmetric", {"const": False}), _given("zp_dtype", _WORD)]},
            zero_point,
        ),
    ]


def _scheme_rules() -> list[_Schema]:
    def weights(schema: _Schema) -> _Schema:
        return _given("weights", {"type": "object"} | schema)

    def microscaled(bits: int, group_size: int) -> _Schema:
        width = {"properties": {"num_bits": {"const": bits}}} if bits == 8 else _given("num_bits", {"const": bits})
        return weights({"allOf": [_FLOAT, width, _given("group_size", {"const": group_size})]})

    int_weights = weights({"properties": {"type": {"enum": ["int"]}}})
    wide_floats = {"properties": {"num_bits": {"const": 8}}}
    demands = {
        "dense": {"properties": {"weights": {"type": "null"}}},
        "int-quantized": int_weights,
        "pack-quantized": int_weights,
        "float-quantized": weights({"allOf": [_FLOAT, wide_floats]}),
        "naive-quantized": weights(_when(_FLOAT, wide_floats)),
        "nvfp4-pack-quantized": microscaled(4, 16),
        "mxfp4-pack-quantized": microscaled(4, 32),
        "mxfp6-pack-quantized": microscaled(6, 32),
        "mxfp8-quantized": microscaled(8, 32),
    }
    return [_when(_given("format", {"const": name}), demand) for name, demand in demands.items()]


_SPARSE_GROUP: _Schema = {"type": "object"} | _given("sparsity", _WORD)
_RULES: dict[type[Model], list[_Schema]] = {
    QuantizationArgs: _args_rules(),
    QuantizationScheme: _scheme_rules(),
    QuantizationConfig: [
        _when(
            _given("sparsity_config", {"type": "object", "minProperties": 1}),
            {"properties": {"config_groups": {"additionalProperties": {"not": _SPARSE_GROUP}}}},
        )
    ],
    SparsityConfig: [
        _when(
            _given("format", {"const": "sparse-24-bitmask"}),
            {"properties": {"sparsity_structure": {"enum": ["2:4", None]}}},
        )
    ],
}

_ACTIVATION_ROLE: _Schema = {
    "properties": {"strategy": {"enum": [*_ACTIVATIONS, None]}, "actorder": {"enum": [None, False]}},
    "allOf": [_NO_CHANNEL_BY_SIZE],
}
# What the place of an object demands of it, beside what it demands itself.
_ROLES: dict[tuple[type[Model], str], _Schema] = {
    (QuantizationScheme, "targets"): {"minItems": 1},
    (QuantizationScheme, "weights"): {
        "properties": {"dynamic": {"const": False}, "strategy": {"not": {"enum": ["token", "attn_head"]}}}
    },
    (QuantizationScheme, "input_activations"): _ACTIVATION_ROLE,
    (QuantizationScheme, "output_activations"): _ACTIVATION_ROLE,
    (QuantizationConfig, "kv_cache_scheme"): _ACTIVATION_ROLE,
}
