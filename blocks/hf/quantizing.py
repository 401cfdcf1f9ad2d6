"""Quantizes a span while transformers loads it, one tensor at a time.

| fact | releases |
| --- | --- |
| a quantizer is asked by hooks which parameters it takes, and for what does it | from 5.21 |
| a converter is copied with `copy`; its patterns are private | from 5.21 |

1. A tensor is quantized as soon as it is read and converted, and dropped: at no moment is more
   than one block's worth of it in memory unquantized. Of a mixture that is read expert by expert,
   it is one expert's worth where the dtype is the files'.
2. What is quantized, and how, is told by `targets` from the empty model: the plan of bytes, the
   loader and the copies on disk agree because they ask the same function.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
)
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from blocks.carve import find_layers
from blocks.experts import Unstacked
from blocks.formats import Kind, is_nf4_fast
from blocks.hf.models import PreTrainedModel
from blocks.hf.release import check_parameters, unsupported
from blocks.quantize import Target, hold, shortfall, targets

_METHOD = "swarm"

logger = logging.getLogger(__name__)


@register_quantization_config(_METHOD)
class QuantConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not followed
    """Asks `from_pretrained` to quantize to `kind` for `device`, computing in `dtype`."""

    def __init__(self, kind: Kind, device: str, dtype: torch.dtype) -> None:
        self.quant_method = _METHOD
        self.kind, self.device, self.dtype = kind, device, dtype
        self.failures: list[str] = []  # transformers only says that a tensor was left out


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not followed
    """transformers' loader asks this which parameters to quantize, and to do it."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **named: Any) -> None:
        config = self.quantization_config
        found = span_targets(model, config.kind, config.device)
        self._wanted = {target.path: target for target in found}
        path, layers = find_layers(model)
        is_on_cpu = torch.device(config.device).type == "cpu"
        is_fast = config.kind == "nf4" and is_on_cpu and is_nf4_fast()
        short = shortfall(layers, found, is_nf4_fast=is_fast, prefix=path)
        if short is not None:
            logger.warning("%s", short)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **named: Any
    ) -> bool:
        return param_name in self._wanted

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel
    ) -> list[Any]:
        """Leave the stacking of experts that will be quantized to us, who never do it."""
        return [self._unstacking(one) for one in weight_conversions]

    def _unstacking(self, conversion: Any) -> Any:
        if not isinstance(conversion, WeightConverter) or not _stacks_experts(conversion):
            return conversion
        return conversion.copy(
            list(conversion._original_source_patterns),
            list(conversion._original_target_patterns),
            operations=[_Unstack(self._wanted, conversion.operations)],
        )

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self._wanted, self.quantization_config)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _stacks_experts(conversion: WeightConverter) -> bool:
    """Does it stack one matrix of each expert, or one made of several, one above the other?"""
    match conversion.operations:
        case [MergeModulelist(dim=0)]:
            return len(conversion.source_patterns) == 1
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return len(conversion.target_patterns) == 1
    return False


class _Unstack(ConversionOps):  # type: ignore[misc]  # transformers is not followed
    """Hands on the experts of a block as they were read, if they will be quantized."""

    def __init__(self, wanted: dict[str, Target], operations: list[ConversionOps]) -> None:
        self._wanted, self._operations = wanted, operations

    def __deepcopy__(self, memory: dict[int, Any]) -> "_Unstack":
        return self  # the loader copies it for every tensor; nothing of it changes

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        **named: Any,
    ) -> dict[str, Any]:
        """As the operations of transformers would, but for the stack."""
        if full_layer_name in self._wanted:
            try:
                parts = [input_dict[name] for name in source_patterns]
                return {target_patterns[0]: Unstacked(parts)}
            except (KeyError, ValueError):
                pass  # a part is missing or odd: transformers says which
        for operation in self._operations:
            input_dict = operation.convert(
                input_dict,
                source_patterns=source_patterns,
                target_patterns=target_patterns,
                full_layer_name=full_layer_name,
                **named,
            )
        return input_dict


class _Quantize(ConversionOps):  # type: ignore[misc]  # transformers is not followed
    """Puts a quantized layer in the place of the one whose tensor was read."""

    def __init__(self, wanted: dict[str, Target], config: QuantConfig) -> None:
        self._wanted, self._config = wanted, config

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        missing_keys: set[str],
        **named: Any,
    ) -> dict[str, Any]:
        """Take what is to be quantized; what else came with it is for the loader to set."""
        left: dict[str, Any] = {}
        for path, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            target = self._wanted.get(path)
            if target is not None and tensor.shape != model.get_parameter(path).shape:
                del self._wanted[path]  # left to the loader, which notes every wrong shape
                target = None
            if target is None:
                left[path] = tensor.stacked() if isinstance(tensor, Unstacked) else tensor
                continue
            try:
                hold(model, target, self._config.dtype, tensor)
            except (RuntimeError, ValueError, MemoryError, OSError, ImportError) as error:
                self._config.failures.append(f"tensor {path} could not be quantized ({error})")
                raise
            missing_keys.discard(path)
        return left


def span_targets(model: PreTrainedModel, kind: Kind, device: str) -> list[Target]:
    """What `kind` will hold of an empty model's layers, the carved ones left out."""
    path, layers = find_layers(model)
    return layer_targets(model, layers, path, kind, device)


def layer_targets(
    model: PreTrainedModel, layers: nn.Module, path: str, kind: Kind, device: str
) -> list[Target]:
    """What `kind` will hold of some layers, found at `path` in the model."""
    kept = tuple(
        str(words)
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for words in getattr(model, name, None) or ()
    )
    return targets(layers, kind, device=device, kept=kept, prefix=path)


def check() -> None:
    """Unsupported for the first thing that is not as known."""
    hooks: dict[str, tuple[str, ...]] = {
        "_process_model_before_weight_loading": ("model",),
        "param_needs_quantization": ("model", "param_name"),
        "update_weight_conversions": ("weight_conversions", "model"),
        "get_quantize_ops": (),
        "is_serializable": (),
    }
    for name, parameters in hooks.items():
        hook = getattr(HfQuantizer, name, None)
        if hook is None:
            raise unsupported(f"a quantizer is not asked by {name}")
        check_parameters(f"HfQuantizer.{name}", hook, dict.fromkeys(parameters, ...))
    patterns = dict.fromkeys(("source_patterns", "target_patterns"), ...)
    check_parameters("WeightConverter.copy", WeightConverter.copy, patterns)
    one = WeightConverter("a", "b", operations=[MergeModulelist(dim=0)])
    if not all(hasattr(one, name) for name in ("_original_source_patterns", "operations")):
        raise unsupported("a converter does not tell its patterns")
