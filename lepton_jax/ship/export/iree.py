"""IREE: a module for a named device, with its weights in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lepton_jax.errors import SettingError, nearest
from lepton_jax.ship.export.lowering import lowered_text
from lepton_jax.ship.export.rules import FOR_IREE
from lepton_jax.ship.export.target import (
    Options,
    Source,
    Target,
    failed,
    write_signature,
)
from lepton_jax.ship.extras import needs


class Device(NamedTuple):
    """A device that IREE compiles for.

    Attributes:
      backend: IREE's name of the code generator.
      arguments: of its compiler.
      driver: that runs the module.
      is_here: whether this machine can run it.
    """

    backend: str
    arguments: tuple[str, ...]
    driver: str
    is_here: bool


DEVICES = {
    "cpu": Device(
        "llvm-cpu",
        ("--iree-llvmcpu-target-cpu=host",),
        "local-sync",
        True,
    ),
    "aarch64": Device(
        "llvm-cpu",
        (
            "--iree-llvmcpu-target-triple=aarch64-unknown-linux-gnu",
            "--iree-llvmcpu-target-cpu=generic",
        ),
        "local-sync",
        False,
    ),
    "vulkan": Device("vulkan-spirv", (), "vulkan", False),
}


class IREE(Target):
    """A module of one batch size for one device."""

    name = "iree"
    runtime = "IREE"
    extra = "edge"
    modules = ("iree.compiler.tools", "iree.runtime")
    has_any_batch = False

    def refusals(
        self,
        source: Source,
        options: Options,
    ) -> list[str]:
        """See `Target.refusals`."""
        if options.device not in DEVICES:
            raise SettingError(
                f"IREE has no device {options.device!r} here"
                f"{nearest(options.device, DEVICES)}",
                where="command line, --device",
                remedy=f"name one of {', '.join(DEVICES)}",
            )
        return super().refusals(source, options)

    def write(
        self,
        source: Source,
        folder: Path,
        options: Options,
    ) -> None:
        """See `Target.write`."""
        tools = needs("iree.compiler.tools", extra="edge", purpose="--to iree")
        device = DEVICES[options.device]
        batch = self.batch_of(source, options)
        assert batch is not None
        text = lowered_text(source, batch, FOR_IREE)
        try:
            content = tools.compile_str(
                text,
                input_type="stablehlo",
                target_backends=[device.backend],
                extra_args=list(device.arguments),
            )
        except tools.CompilerToolError as error:
            raise failed("iree", error) from error
        (folder / "model.vmfb").write_bytes(content)
        write_signature(
            self.name,
            source,
            folder,
            batch,
            device=options.device,
            driver=device.driver,
            is_here=device.is_here,
        )
