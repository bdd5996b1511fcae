"""The language program on several devices and in several processes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.benchmarks.language_runs import (
    ROOT,
    finish,
    finish_all,
    losses,
    options,
    saved_steps,
    start,
    text as text,
)

pytestmark = pytest.mark.optimised

MORE = ["--batch-size", "16", "--dim", "16", "--steps", "20", "--seed", "1"]
FLAG = "--xla_force_host_platform_device_count="


def run(path, text, *more, devices=8):
    """The losses of a run in a process of its own."""
    path.mkdir()
    finish(start([*options(path, text, *MORE), *more], XLA_FLAGS=f"{FLAG}{devices}"))
    return [row[2] for row in losses(path / "out")]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=4,fsdp=2", "fsdp=8"])
def test_losses_on_several_devices_are_those_of_one(tmp_path, text, mesh):
    one = run(tmp_path / "one", text)
    many = run(tmp_path / "many", text, "--mesh", mesh)
    assert len(one) == 21
    np.testing.assert_allclose(many, one, rtol=1e-5)


@pytest.mark.slow
def test_parts_of_a_batch_on_several_devices(tmp_path, text):
    one = run(tmp_path / "one", text)
    mesh = ["--mesh", "data=2,fsdp=2", "--accumulate", "2"]
    np.testing.assert_allclose(
        run(tmp_path / "many", text, *mesh, devices=4), one, rtol=1e-5
    )


@pytest.mark.slow
def test_gradients_are_summed_and_weights_gathered_once():
    command = [sys.executable, "-m", "tests.benchmarks.language_programs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{FLAG}8"}
    found = json.loads(subprocess.check_output(command, env=environment))
    single, rest = found[0], found[1:]
    assert not single["collectives"]
    for few, many in zip(rest[::2], rest[1::2], strict=True):
        assert (few["solver_steps"], many["solver_steps"]) == (4, 32)
        assert few["collectives"] == many["collectives"]
        assert not few["in_loops"] + many["in_loops"]
        # One sum, over gradients and metrics together.
        assert few["collectives"].count("all-reduce") == 1
        assert few["temp_bytes"] <= single["temp_bytes"] / 6
        if "fsdp" in few["mesh"]:
            assert "all-gather" in few["collectives"]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, text):
    one = run(tmp_path / "one", text)
    path = tmp_path / "two"
    path.mkdir()
    mesh = ["--mesh", "data=4,fsdp=2", "--save-every", "10"]

    def pair(*more):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        place = f"localhost:{port},{{}}/2"
        given = [*options(path, text, *MORE), *mesh, *more, "--processes"]
        processes = [
            start([*given, place.format(i)], XLA_FLAGS=f"{FLAG}4") for i in range(2)
        ]
        return finish_all(processes)

    first, second = pair()
    assert "bits per byte:" in first
    assert "bits per byte:" not in second
    got = [row[2] for row in losses(path / "out")]
    np.testing.assert_allclose(got, one, rtol=1e-5)
    # What both have written is one checkpoint, with which they go on.
    assert saved_steps(path / "out") == [10, 20]
    again, _ = pair("--resume")
    assert again.splitlines()[-1] == first.splitlines()[-1]
