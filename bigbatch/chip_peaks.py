"""The published peaks of known chips, to hold a run's operations against: a table."""

# Floating-point operations a second of what JAX calls one device (of v2 and v3 a core, half a
# chip), dense, by the type that matrix units multiply. TPUs as on Google's pages, GPUs as in
# NVIDIA's data sheets of the SXM boards; the PCIe boards of the H100 and H200 are clocked lower and
# are left unknown.
_TPU = {"TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
        "TPU v5": 459e12, "TPU v6 lite": 918e12}
_A100 = {"bfloat16": 312e12, "tf32": 156e12}
_HOPPER = {"bfloat16": 989e12, "tf32": 494.7e12}
_GPU = {
    "NVIDIA A100-SXM4-40GB": _A100, "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100, "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _HOPPER, "NVIDIA H200": _HOPPER,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """The most floating-point operations a second of one device; None where that is not known.

    At JAX's default precision float32 is multiplied in one pass of bfloat16 on TPUs and as tf32 on
    these GPUs, so these are the peaks taken for it. In float64 none is taken.

    Args:
        device_kind: as JAX spells it.
        dtype: that the network computes in, as `config.dtype`.
    """
    if dtype not in ("bfloat16", "float32"):
        return None
    if device_kind in _TPU:
        return _TPU[device_kind]
    return _GPU.get(device_kind, {}).get("bfloat16" if dtype == "bfloat16" else "tf32")
