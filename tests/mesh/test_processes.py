"""Two processes of this machine, by `jax.distributed`, compute what one device computes."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from .worker import WAYS

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds; on an idle core both processes take ten


@pytest.mark.kernels
def test_two_processes_equal_one_device():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", env.get("XLA_FLAGS", ""))
    command = [sys.executable, "-m", "tests.mesh.worker", port]
    workers = [
        subprocess.Popen(
            [*command, str(i)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for i in range(2)
    ]
    try:
        said = [worker.communicate(timeout=PATIENCE) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (out, err) in zip(workers, said, strict=True):
        assert worker.returncode == 0, err[-3000:]
        errors = dict(re.findall(r"(\w+): (\S+)\n", out))
        assert list(errors) == list(WAYS), out
        assert all(float(error) < 1e-5 for error in errors.values()), errors
