"""A second device where there is none: tensors that lie on the CPU, and say that they do not.

Operators run on the CPU and refuse tensors of two devices, as a GPU's do. `waits` lists the copies
between the devices that keep the host waiting, with the functions in which they happened: on a GPU
each of them ends the queue of work that hides the time it takes to launch a kernel.

    python tests/pretend.py FOLDER

trains some runs with device=pretend and with device=cpu, and prints what came out, a line of JSON
each. A process of its own, because torch has room for one such device and keeps it.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
# as with a GPU: what two modules share stays shared when a model moves
torch.__future__.set_swap_module_params_on_conversion(True)
DEVICE = torch.device("pretend:0")
waits: list[list[str]] = []


class Pretend(Tensor):
    """`raw` is the tensor on the CPU."""

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False):
        own = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        own.raw = raw
        return own

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return apart(func, args, kwargs or {})

    def tolist(self) -> list:
        waited()
        return self.raw.tolist()

    def __reduce_ex__(self, protocol):
        rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (self.raw, self.dtype, str(DEVICE), self.requires_grad)


def waited() -> None:
    waits.append([frame.name for frame in traceback.extract_stack()])


def raw(value: object) -> object:
    return value.raw if isinstance(value, Pretend) else value


def apart(func, args: tuple, kwargs: dict) -> object:
    """Runs an operator of any tensors; Pretend ones go in as they are and come out as such."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, Pretend)]
    others = [t for t in tensors if not isinstance(t, Pretend)]
    aten, there = torch.ops.aten, kwargs.get("device")
    copies = func in (aten._to_copy.default, aten.copy_.default)
    if ours and any(t.dim() for t in others) and not copies:
        raise RuntimeError(f"{func} of tensors on pretend and on the CPU")
    made_ours = bool(ours) if there is None else torch.device(there).type == "pretend"
    crossing = copies and ((made_ours != bool(ours)) or (ours and others))
    goes_on = copies and (kwargs.get("non_blocking") or True in args[2:3])  # copy_'s third
    if (crossing and not goes_on) or (func is aten._local_scalar_dense.default and ours):
        waited()
    here = kwargs | ({"device": torch.device("cpu")} if there is not None else {})
    out = func(*tree_map(raw, args), **tree_map(raw, here))
    if func is aten.copy_.default:
        return args[0]
    known = {id(t.raw): t for t in ours}  # what is changed in place stays the same tensor

    def wrapped(value: object) -> object:
        if not (made_ours and isinstance(value, Tensor)):
            return value
        return known[id(value)] if id(value) in known else Pretend(value)

    return tree_map(wrapped, out)


class Pretending(TorchDispatchMode):
    """Lets factories make tensors on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return apart(func, args, kwargs or {})


# torch.tensor(.., device=..) calls these two past any mode
library = torch.library.Library("aten", "IMPL")


@torch.library.impl("aten::empty_strided", "PrivateUse1", lib=library)
def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::_copy_from", "PrivateUse1", lib=library)
def copy_from(source, target, non_blocking=False):
    if not non_blocking:
        waited()
    raw(target).copy_(raw(source))
    return target


TRIALS = {
    "linear": [["method=linear"]],
    "mixed": [
        ["method=alore", "optim.mixup=0.8", "optim.cutmix=1", "optim.ema=0.9", "optim.clip_norm=1"]
    ],
    "accumulated": [["method=lava", "optim.accumulate=2", "optim=sgd_cosine"]],
    "checkpointed": [["method=vpt_deep", "grad_checkpointing=true"]],
    "projected": [["method=superlora_projected", "optim.label_smoothing=0.1"]],
    "supernet": [["method=noah_supernet", "protocol=vtab_peek"]],
    "pack": [
        ["method=lora", "pack=all", "optim.lr=1e-3"],
        ["method=lora", "pack=all", "optim.lr=2e-3", "method.alpha=1"],
    ],
}


def trial(folder: Path, overrides: list[list[str]], device: str) -> list:
    """The metrics of runs that are stopped after seven of ten steps and go on from there."""
    cfgs = [config(folder, "checkpoint_seconds=0", f"device={device}", *o) for o in overrides]
    with ending_before(7):
        assert all(isinstance(error, MemoryError) for error in train.run_pack(cfgs))
    train.run_pack(cfgs)
    return [read(train.Run(cfg).folder / "record.json")["metrics"] for cfg in cfgs]


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    from test_train import config, ending_before

    import train
    from peft.record import read

    for name, overrides in TRIALS.items():
        folder = Path(sys.argv[1]) / name
        waits.clear()
        with Pretending():
            pretended = trial(folder / "pretend", overrides, "pretend")
        told = {"pretend": pretended, "cpu": trial(folder / "cpu", overrides, "cpu")}
        print(json.dumps({"trial": name, **told, "waits": [s for s in waits if "fit" in s]}))
