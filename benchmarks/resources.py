"""`python -m benchmarks.resources`: registers, spills and shared memory of every kernel.

Compiled by the official Triton, at every tile that the heuristics pick; needs no GPU. Exit code 1
where a kernel spills, takes more shared memory than the GPU has, or misses Hopper's products.

The assembler also moves a few registers of its own accord to memory where that lets one more
program run on a multiprocessor (it then stops at 64, 80, 96, 128 or 168): up to 64 bytes of a
kernel with registers to spare are no fault. Some tiles of Hopper spill and are kept: they were
measured to be faster than all that do not (MEASURED_FASTER).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import tyro

from benchmarks.resource_cases import AnyCase, cases
from pallas_kernels.official import Resources, measure
from pallas_kernels.tiles import Tile

# Most bytes of shared memory a program can have, by compute capability.
SHARED_LIMITS = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
MAX_REGISTERS = 255
TRADED_BYTES = 64
# Spills a little in some calls (not where tiles divide the lengths), and was measured faster than
# every tile that never does: benchmarks/results/h100-tune.json; with grouped heads the second,
# h100-tune-gqa.json, and where each head of a group has a loop of its own the third,
# h100-tune-gqa-32k.json.
MEASURED_FASTER: set[tuple[int, str, Tile]] = {
    (90, "dkv", Tile(64, 64, 4, 2)),
    (90, "dkv", Tile(64, 128, 8, 3)),
    (90, "dkv", Tile(32, 64, 4, 3)),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Which GPU generations; all by default."""

    capabilities: tuple[int, ...] = tuple(SHARED_LIMITS)


def faults(case: AnyCase, kernel: str, capability: int, needs: Resources) -> list[str]:
    """What is wrong with a kernel, in words; nothing where it fits."""
    found = []
    measured = (capability, kernel, case.tile(kernel)) in MEASURED_FASTER
    allowed = TRADED_BYTES if needs.registers < MAX_REGISTERS else 0
    if not measured and needs.spill_bytes > allowed:
        found.append(f"spills {needs.spill_bytes} bytes a thread")
    if needs.shared_bytes > SHARED_LIMITS[capability]:
        found.append(f"takes {needs.shared_bytes} of {SHARED_LIMITS[capability]} shared bytes")
    if capability == 90 and case.wants_wgmma(kernel) and not needs.wgmma:
        found.append("does not use wgmma")
    return found


def rows(capability: int) -> Iterator[tuple[AnyCase, str, Resources]]:
    """Each distinct kernel once: several cases share one."""
    seen = set()
    for case in cases(capability):
        for kernel in case.names:
            ir = case.kernels[kernel]
            if ir not in seen:
                seen.add(ir)
                yield case, kernel, measure(ir, capability)


def format_row(case: AnyCase, kernel: str, capability: int, needs: Resources) -> str:
    tile = "{}x{} {}w {}s".format(*dataclasses.astuple(case.tile(kernel))[:4])
    verdict = "; ".join(faults(case, kernel, capability, needs)) or "fits"
    return (
        f"{capability:>5} {case.variant:<15} {case.dtype:<9} {case.head_dim:>4} "
        f"{case.block_size:>5} {kernel:<8} {tile:<14} {needs.registers:>9} {needs.spill_bytes:>6} "
        f"{needs.shared_bytes / 1024:>9.1f} {'yes' if needs.wgmma else 'no':>5}  {verdict}"
    )


def main(options: Options) -> None:
    print(
        f"{'sm':>5} {'call':<15} {'dtype':<9} {'dim':>4} {'block':>5} {'kernel':<8} "
        f"{'tile':<14} {'registers':>9} {'spill':>6} {'shared KB':>9} {'wgmma':>5}"
    )
    failed = False
    for capability in options.capabilities:
        for case, kernel, needs in rows(capability):
            print(format_row(case, kernel, capability, needs), flush=True)
            failed |= bool(faults(case, kernel, capability, needs))
    sys.exit(int(failed))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
