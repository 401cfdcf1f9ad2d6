"""From a checkpoint's names to a filled model, by transformers' own loader and conversions.

| fact | releases |
| --- | --- |
| `from_pretrained(None, config=, state_dict=)` fills a model from lazy slices | from 5.0 |
| no exception names a tensor that could not be converted: a row of its report does | from 5.0 |
| conversions are asked of a model, names go through them by position | from 5.20 |
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from blocks.hf.models import PretrainedConfig, PreTrainedModel, causal_class, tiny_model
from blocks.hf.models import logging as transformers_logging
from blocks.hf.release import Fact, as_known, check_facts, check_parameters

# a row of the table in transformers' report: name | CONVERSION | details, perhaps in colours
_UNCONVERTED = re.compile(r"^([\w.]+)[^|\n]*\|[^|\n]*CONVERSION", re.MULTILINE)


def filled(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    quantization: Any = None,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model of that class with weights from `tensors`, and what the loader says of it.

    That is its "missing_keys", its "mismatched_keys" (name, shape there, shape wanted) and
    "error_msgs". Raises what the loader raises.
    """
    extra = {} if quantization is None else {"quantization_config": quantization}
    with as_known("transformers' loader"):
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # listed, so that we can name them
            output_loading_info=True,
            **extra,
        )
        return model, {key: found[key] for key in ("missing_keys", "mismatched_keys", "error_msgs")}


def landing(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Those of a checkpoint's names that land in `model`, as transformers' loader decides it, each
    with the name of the weight it becomes, or becomes a part of.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    prefix, weights = model.base_model_prefix, model.state_dict()
    found = {}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, weights)
        if renamed not in weights and name in weights:
            renamed, _ = rename_source_key(name, [], [], prefix, weights)
        if renamed in weights:
            found[name] = renamed
    return found


class Report(logging.Filter):
    """Keeps what transformers reports of its loading, and lets nobody else see it."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Take a line."""
        self.text += record.getMessage() + "\n"
        return False

    @property
    def unconverted(self) -> str | None:
        """The first tensor that could not be converted."""
        return next(iter(_UNCONVERTED.findall(self.text)), None)


@contextmanager
def quiet() -> Iterator[Report]:
    """Within, transformers shows no bars and logs no keys: we drop most of them on purpose.

    Its report is still needed, as no exception names a tensor that could not be converted.
    """
    verbosity, has_bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    reporter, report = logging.getLogger(PreTrainedModel.__module__), Report()
    level = reporter.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    reporter.setLevel(logging.WARNING)
    reporter.addFilter(report)
    try:
        yield report
    finally:
        reporter.removeFilter(report)
        reporter.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()


def _fills() -> bool:
    """Does a model take its weights from tensors by name, in the dtype that is asked for?"""
    whole = tiny_model()
    tensors = {name: torch.full_like(value, 0.5) for name, value in whole.state_dict().items()}
    del tensors["lm_head.weight"], tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 8)
    with quiet():
        model, found = filled(causal_class(whole.config), whole.config, tensors, torch.bfloat16)
    (odd,) = found["mismatched_keys"]
    return (
        set(found["missing_keys"]) == {"model.norm.weight"}
        and odd[0] == "model.layers.1.mlp.up_proj.weight"
        and {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        and bool((model.lm_head.weight == 0.5).all())
    )


def _renames() -> bool:
    names = ("model.embed_tokens.weight", "embed_tokens.weight", "nobody.weight")
    found = landing(tiny_model(), names)
    return found == dict.fromkeys(names[:2], names[0])


FACTS = (
    Fact(
        "the loader fills a model by names, and lists what is missing or has another shape", _fills
    ),
    Fact("the loader's names of a checkpoint's tensors can be asked for", _renames),
)


def check() -> None:
    """Unsupported for the first thing that is not as known."""
    known = {"config": None, "ignore_mismatched_sizes": False}
    check_parameters("from_pretrained", PreTrainedModel.from_pretrained, known)
    check_facts(FACTS)
