"""Quantizes a span while transformers loads it, one tensor at a time.

1. A tensor is quantized as soon as it is read and converted, and dropped: at no moment is more
   than one block's worth of it in memory unquantized.
2. What is quantized, and how, is told by `targets` from the empty model: the plan of bytes, the
   loader and the copies on disk agree because they ask the same function.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from blocks.carve import find_layers
from blocks.formats import Kind, is_nf4_fast
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

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self._wanted, self.quantization_config)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


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
                left[path] = tensor
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
