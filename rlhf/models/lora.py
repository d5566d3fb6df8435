"""LoRA by PEFT (arXiv 2106.09685): adapters in a model, off for a while, beside it on disk.

The adapters live in the model itself, so that everything which reads the model finds them: the
rollout engine, the forward passes, the optimizer. Their weights are never added to the model's own
while it trains; on disk the model has them added, and they lie beside it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.config import LoraConfig

ADAPTER = "default"  # PEFT's name for the only one
HEADS = ("score",)  # new in a reward model: trained whole


def add_adapters(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Put adapters into a model, in place, and freeze what they adapt; none if `config.r` is 0.

    The score head of a reward model or critic stays trainable. Adapters begin as zero, so the model
    computes what it did. Raises ValueError if no module has one of the target names.
    """
    if not config.r:
        return model
    import peft

    adapters = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules or "all-linear",
        task_type="SEQ_CLS" if any(hasattr(model, head) for head in HEADS) else "CAUSAL_LM",
    )
    training = model.training
    try:
        peft.inject_adapter_in_model(adapters, model, adapter_name=ADAPTER)
    except ValueError as error:
        raise ValueError(f"model.lora.target_modules: {error}") from error
    for head in HEADS:
        if hasattr(model, head):
            getattr(model, head).requires_grad_(True)
    return model.train(training)


def has_adapters(model: nn.Module) -> bool:
    return next(_layers(model), None) is not None


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before its adapters, for as long as the block lasts."""
    layers = [layer for _, layer in _layers(model)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:  # enable_adapters(False) would take requires_grad away too
        layer._disable_adapters = True
    try:
        yield model
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


class WithoutAdapters(nn.Module):
    """A model with its adapters off, for log-probs: the same weights, no second copy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._adapted = (model,)  # in a tuple: its parameters are not this module's

    @property
    def adapted(self) -> Any:
        """The model with its adapters."""
        return self._adapted[0]

    @property
    def config(self) -> Any:
        return self.adapted.config

    def forward(self, *args: Any, **options: Any) -> Any:
        with adapters_off(self.adapted) as model:
            return model(*args, **options)

    def base_model(self, *args: Any, **options: Any) -> Any:
        """The body's forward pass, as HF models have it."""
        with adapters_off(self.adapted) as model:
            return model.base_model(*args, **options)  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module:
        return self.adapted.get_output_embeddings()


def merged_state_dict(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the adapters added in fp32, under the names of the model without any.

    `weights` are the model's state_dict; the model itself, which may hold other weights or none, is
    left alone.
    """
    layers = dict(_layers(model))
    merged = {}
    for name, value in weights.items():
        owner, base, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if base and leaf == "weight":
            with _holding(layers[owner], owner, weights):
                delta = layers[owner].get_delta_weight(ADAPTER)
            value = (value.float() + delta.float()).to(value.dtype)
        merged[f"{owner}.{leaf}" if base else name] = value
    return merged


def save_adapters(
    model: nn.Module, weights: Mapping[str, Tensor], folder: Path, *, base: str
) -> None:
    """Write the adapters, and the score head if there is one, in PEFT's format.

    `base` is the model that they were trained on: `PeftModel.from_pretrained` puts them back there.
    """
    import peft

    config: Any = model.peft_config[ADAPTER]  # type: ignore[index]
    adapters = peft.get_peft_model_state_dict(model, dict(weights), adapter_name=ADAPTER)
    heads = [head for head in HEADS if hasattr(model, head)]
    adapters |= {n: w for n, w in weights.items() if n.split(".")[0] in heads}
    saved = {f"base_model.model.{name}": value.contiguous() for name, value in adapters.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    record = peft.LoraConfig(**config.to_dict())
    record.base_model_name_or_path = base
    record.modules_to_save = heads or None
    record.inference_mode = True
    record.save_pretrained(str(folder))


def reference_of(actor: nn.Module) -> nn.Module:
    """The reference of PPO: the actor as it is now, frozen.

    A copy; with adapters, which are zero at the start, the actor itself without them.
    """
    if has_adapters(actor):
        return WithoutAdapters(actor)
    return copy.deepcopy(actor).requires_grad_(False)


@contextlib.contextmanager
def whole_model(reference: nn.Module) -> Iterator[nn.Module]:
    """What `reference_of` gave as a model that can generate, for as long as the block lasts."""
    if not isinstance(reference, WithoutAdapters):
        yield reference
        return
    with adapters_off(reference.adapted) as model:
        yield model


@contextlib.contextmanager
def _holding(layer: nn.Module, name: str, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A layer's adapters with the given weights for as long as the block lasts."""
    own = {n: p for n, p in layer.named_parameters() if n.startswith("lora_")}
    before = {n: p.data for n, p in own.items()}
    for n, parameter in own.items():
        parameter.data = weights[f"{name}.{n}"]
    try:
        yield
    finally:
        for n, parameter in own.items():
            parameter.data = before[n]


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers by name."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name, module
