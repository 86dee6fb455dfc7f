"""The one place where the processes of a run join; today a run is one process."""

from __future__ import annotations

import jax

from lepton_jax.errors import PlanError


def join(devices: int | None) -> None:
    """Before JAX's first use: ask for `devices` virtual devices, should the platform turn out to be the CPU.

    Raises:
      PlanError: JAX already runs with another number of devices.
    """
    if devices is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        if len(jax.devices()) < devices:
            raise PlanError(f"JAX is already running with {len(jax.devices())} devices, {devices} are asked for",
                            where="--devices", remedy="start a new process") from error
