"""Where a model runs and in which dtype, by name, and the arguments with which `from_pretrained` loads onto it."""

from __future__ import annotations

import torch

AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16", "float16")


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name of a dtype of weights, as "bfloat16" for `torch.bfloat16`; "auto" is a name, too.

    Raises:
        ValueError: Models are not computed in this dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; allowed: {', '.join(DTYPES)}")
    return name


def choose_device(name: str | torch.device = AUTO) -> torch.device:
    """Return the device of a name; "auto" is cuda if available, otherwise cpu.

    Raises:
        ValueError: The name is not that of a device, or there is no such device.
    """
    found = torch.cuda.is_available()
    if name == AUTO:
        return torch.device("cuda" if found else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; allowed: {AUTO}, cpu, cuda, cuda:0, ...")
    if device.type == "cuda" and not found:
        raise ValueError(f"device {name!r} is not available: torch does not find a CUDA device")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not available: torch finds {torch.cuda.device_count()} CUDA devices")
    return device


def loading_options(name: str = AUTO) -> dict:
    """Return the arguments of `from_pretrained` that load a model onto the device of a name.

    With "auto" on a machine with several GPUs, a model that does not fit on the first continues on the next.

    Raises:
        ValueError: See `choose_device`.
    """
    device = choose_device(name)
    if device.type == "cpu":
        return {}
    if name == AUTO and torch.cuda.device_count() > 1:
        return {"device_map": "sequential"}
    return {"device_map": str(device)}
