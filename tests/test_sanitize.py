"""The driver of NVIDIA's checkers, with a script in place of `compute-sanitizer`."""

import pytest

from tests import sanitize
from tests.sanitize_calls import PLANTED_FAULT

# Its last two arguments are the call and the launcher; each call has its own end here.
FAKE = r"""#!/bin/sh
echo "$XLA_PYTHON_CLIENT_ALLOCATOR $XLA_FLAGS $*" >> "$SEEN"
launcher=$(eval echo "\${$#}"); name=$(eval echo "\${$(($# - 1))}")
echo "========= COMPUTE-SANITIZER"
case $name in
planted-fault)
  if [ -n "$MISSES" ]; then echo "========= ERROR SUMMARY: 0 errors"; exit 0; fi
  echo "========= Invalid __global__ read of size 4 bytes"
  echo "=========     at s2_attention_planted_fault+0x90"
  echo "========= ERROR SUMMARY: 1 error"; exit 1 ;;
packed) echo "$name by $launcher ran"; echo "========= ERROR SUMMARY: 0 errors" ;;
window)
  echo "========= Error: Race reported between Write access at s2_attention_forward+0x10"
  echo "=========     Host Frame: main [0x1] in python"
  echo "$name by $launcher ran"
  echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"; exit 1 ;;
lengths) echo "ValueError: no GPU"; echo "========= ERROR SUMMARY: 0 errors" ;;
block-mask) sleep 60 ;;
*) echo "$name by $launcher ran"
  echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
esac
"""


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """Puts the script on PATH; a file of what it was called with."""
    script = tmp_path / "compute-sanitizer"
    script.write_text(FAKE)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return tmp_path / "seen"


def test_clean_calls_end_with_zero(seen, capsys):
    assert sanitize.main(["packed", "--tools", "memcheck"]) == 0
    out = capsys.readouterr().out
    assert "memcheck triton packed: clean" in out
    assert f"memcheck jax_triton {PLANTED_FAULT}: found" in out
    assert "4 of 4 as they should be" in out
    lines = seen.read_text().splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("platform ")
        assert "--xla_gpu_enable_command_buffer= " in line
        assert "--tool memcheck --error-exitcode 1 --kernel-name kns=s2_attention" in line
    ports = [line.split("--port ")[1].split()[0] for line in lines]
    assert len(set(ports)) == 4


def test_errors_crashes_and_time_are_told_apart(seen, capsys):
    arguments = "window lengths block-mask soft-cap --tools racecheck --launchers triton"
    assert sanitize.main([*arguments.split(), "--timeout", "2"]) == 1
    out = capsys.readouterr().out
    assert "racecheck triton window: errors" in out
    assert "Race reported between Write access" in out
    assert "Host Frame" not in out
    assert "ValueError: no GPU" in out
    table = dict(line.split(maxsplit=1) for line in out.split("\n\n")[-1].splitlines())
    states = {"window": "errors", "lengths": "errors", "block-mask": "timed out"}
    for name, state in (states | {"soft-cap": "clean"}).items():
        assert table[name].split("  ")[-1].strip() == state


def test_a_tool_that_misses_the_planted_fault_proves_nothing(seen, capsys, monkeypatch):
    monkeypatch.setenv("MISSES", "1")
    assert sanitize.main(["packed", "--tools", "memcheck", "--launchers", "triton"]) == 1
    assert f"{PLANTED_FAULT}: missed" in capsys.readouterr().out


def test_arguments():
    options = sanitize.parse([])
    jobs = sanitize.make_jobs(options)
    assert [job.name for job in jobs[:2]] == [PLANTED_FAULT] * 2
    assert len(jobs) == 2 + 2 * 2 * len(sanitize.NAMES)
    assert all(job.timeout == 90 for job in jobs)
    assert options.workers == 6
    with pytest.raises(SystemExit):
        sanitize.parse(["no-such-call"])
    with pytest.raises(SystemExit):
        sanitize.parse(["--tools", "valgrind"])


def test_without_the_tool_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert sanitize.main(["packed"]) == 2
    assert "not on PATH" in capsys.readouterr().err
