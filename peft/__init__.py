"""Visual parameter-efficient fine-tuning: methods as sites x tuner x merge on frozen backbones.

This is the suite's own package, used from a checkout and never installed. It is not Hugging Face's
`peft`, which it shadows here.
"""

from importlib import import_module

# By name, when first asked for: what only lists runs (sweep.py) need not wait seconds for torch
# and timm.
PUBLIC = {
    "Tuner": "core",
    "WeightTuner": "core",
    "adapter_state": "state",
    "attach": "core",
    "build_backbone": "backbone",
    "count": "state",
    "create": "config",
    "load_adapter_state": "state",
    "merge": "core",
    "penalty": "core",
    "tuners": "core",
}
__all__ = list(PUBLIC)


def __getattr__(name: str):
    if name in PUBLIC:
        return getattr(import_module(f"peft.{PUBLIC[name]}"), name)
    if name in PUBLIC.values():
        return import_module(f"peft.{name}")
    # ImportError, not AttributeError: `from peft import X` would lose the text of the latter.
    if name in {"get_peft_model", "LoraConfig", "PeftModel", "PeftConfig", "TaskType"}:
        raise ImportError(
            f"{name} belongs to Hugging Face's peft; this is the suite's own package of that "
            "name, which shadows it here"
        )
    raise AttributeError(f"module 'peft' has no attribute {name!r}")
