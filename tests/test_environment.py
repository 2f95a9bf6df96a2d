"""What the machine and its containers give, and what happens where it is too little."""

import fcntl

import jax
import jax.numpy as jnp
import pytest

from moejax import environment
from moejax.environment import runs_on_cpu
from moejax.likelihood.blocks import sample_blocks
from moejax.sweep.execution.cores import CoreClaim


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A stand-in for /sys/fs/cgroup and /proc/self/cgroup: file names and contents -> both."""

    def write(own: str, files: dict[str, str]) -> None:
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        (tmp_path / "own").write_text(own)
        monkeypatch.setattr(environment, "CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(environment, "OWN_CGROUPS", tmp_path / "own")

    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda process: set(range(4, 12)))
    return write


SECOND, FIRST = "0::/job/step\n", "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/job\n"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        (SECOND, {}, 8),
        (SECOND, {"job/step/cpu.max": "max 100000\n"}, 8),
        (SECOND, {"job/step/cpu.max": "250000 100000"}, 3),
        (SECOND, {"job/step/cpu.max": "500000 100000", "job/cpu.max": "200000 100000"}, 2),
        (SECOND, {"cpu.max": "5000 100000"}, 1),
        (SECOND, {"job/step/cpu.max": "1600000 100000"}, 8),
        (SECOND, {"job/step/cpu.max": "nonsense"}, 8),
        (FIRST, {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"}, 4),
        (FIRST, {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 8),
        ("", {}, 8),
    ],
)
def test_a_containers_share_of_time_limits_the_cores(groups, own, files, cores):
    groups(own, files)
    assert environment.available_cores() == list(range(4, 4 + cores))


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        (SECOND, {"job/memory.max": "1073741824"}, 2**30),
        (SECOND, {"job/step/memory.max": "max", "memory.max": "4096"}, 4096),
        (FIRST, {"memory/job/memory.limit_in_bytes": "2147483648"}, 2**31),
        (FIRST, {"memory/job/memory.limit_in_bytes": "9223372036854771712"}, None),
        (SECOND, {}, None),
    ],
)
def test_a_containers_memory_is_the_memory(groups, own, files, limit):
    import os

    groups(own, files)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert environment.memory_bytes() == (whole if limit is None else min(limit, whole))


def test_two_sweeps_are_not_pinned_to_the_same_cores(tmp_path, monkeypatch):
    monkeypatch.setattr("moejax.sweep.execution.cores.available_cores", lambda: [0, 1, 2])
    first, second = CoreClaim(str(tmp_path)), CoreClaim(str(tmp_path))
    assert first.take(2) == [0, 1]
    assert second.take(2) == [2, None]  # what finds no free core goes where the system sends it
    first.release()
    third = CoreClaim(str(tmp_path))
    assert third.take(1) == [0]
    third.release()
    assert CoreClaim(str(tmp_path / "nowhere")).take(2) == [None, None]
    with open(tmp_path / "core-2", "a") as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    second.release()


def test_the_machines_faults_are_told_from_a_functions():
    for error in (
        MemoryError(),
        OSError(24, "Too many open files"),
        RuntimeError("can't start new thread"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4 bytes."),
    ):
        assert environment.is_machines_fault(error)
    for error in (
        FileNotFoundError(2, "No such file"),
        RuntimeError("my own"),
        ValueError("RESOURCE_EXHAUSTED"),
        ZeroDivisionError(),
    ):
        assert not environment.is_machines_fault(error)


def test_no_thread_is_no_property_of_an_activation():
    """It would be kept as a result: a cell that cannot be prepared."""
    from moejax.model.activations import activation_facts

    def starved(t):
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="can't start new thread"):
        activation_facts(starved)


def test_memory_of_gpus_comes_from_their_driver(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpu_memory_bytes() == 40960 * 2**20
    program.write_text("#!/bin/sh\nexit 9\n")
    assert environment.gpu_memory_bytes() is None


def test_a_program_for_a_cpu_of_another_machine_has_the_cpus_blocks(monkeypatch):
    """On a machine whose default is an accelerator, `jax.default_device` places a fit on its CPU."""
    x, y, weights = jnp.zeros((20_000, 2)), jnp.zeros(20_000), jnp.ones(20_000)

    def block_size() -> int:
        return sample_blocks(x, y, weights, fit_intercept=False).design.shape[2]

    on_cpu = block_size()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not runs_on_cpu()
    assert block_size() > on_cpu
    with jax.default_device(jax.devices("cpu")[0]):
        assert runs_on_cpu()
        assert block_size() == on_cpu


def test_compiled_programs_are_kept_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "SHORTEST_KEPT", 0.0)
    jax.jit(lambda t: t + 1.25)(jnp.ones(3))  # this process has compiled before
    assert environment.keep_compiled_programs(tmp_path / "new" / "kept") == tmp_path / "new" / "kept"
    jax.jit(lambda t: jnp.sin(t) * 1.75)(jnp.ones(3))
    assert list((tmp_path / "new" / "kept").iterdir())


def test_a_folder_that_cannot_hold_programs_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    before = jax.config.values["jax_compilation_cache_dir"]
    with pytest.raises(ValueError, match=r"^folder: .*file.* cannot be made \(File exists\)$"):
        environment.keep_compiled_programs(tmp_path / "file")
    monkeypatch.setenv("MOEJAX_CACHE_DIR", "")
    with pytest.raises(ValueError, match=r"^folder: MOEJAX_CACHE_DIR is empty; name one$"):
        environment.keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == before
