"""What a run was made with: versions, devices, command, commit, flags."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax",
    "orbax-checkpoint", "grain", "numpy", "triton", "jax-triton",
)  # fmt: skip


def environment() -> str:
    """JSON text."""
    facts = {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "commit": _commit(),
        "flags": flags(),
    }
    return json.dumps(facts, indent=2) + "\n"


def flags() -> dict[str, str]:
    """What the process's environment tells XLA and NCCL, which changes speeds and roundings."""
    names = (name for name in os.environ if name == "XLA_FLAGS" or name.startswith("NCCL_"))
    return {name: os.environ[name] for name in sorted(names)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this file is in, if it is one."""
    command = ("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
