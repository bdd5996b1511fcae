"""Killed, stopped or out of room: nothing that was saved is lost."""

import random
import resource
import signal
import time

import pytest

from tests.benchmarks.language_runs import (
    finish,
    losses,
    options,
    saved_steps,
    start,
    text as text,
)


def kill_and_resume(tmp_path, text, want, seed):
    """Kill a run at a random step, resume it, compare its losses bit for bit."""
    path = tmp_path / f"killed-{seed}"
    path.mkdir()
    given = options(path, text, "--steps", "400", "--eval-every", "100")
    given += ["--save-every", "20"]
    process = start(given)
    wanted = random.Random(seed)
    least = wanted.randrange(1, 15) * 20
    while process.poll() is None:
        if max(saved_steps(path / "out"), default=0) >= least:
            time.sleep(wanted.random() * 0.1)
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    process.stdout.close()
    finished = (path / "out" / "results.json").exists()
    finish(start([*given, "--resume"]))
    assert losses(path / "out") == want
    return finished


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path, text):
    given = options(tmp_path, text, "--steps", "400", "--eval-every", "100")
    finish(start([*given, "--save-every", "20"]))
    want = losses(tmp_path / "out")
    finished = [kill_and_resume(tmp_path, text, want, seed) for seed in range(2)]
    assert not all(finished)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, text, number):
    given = options(tmp_path, text, "--steps", "100000", "--eval-every", "50")
    process = start(given)
    while process.poll() is None and not saved_steps(tmp_path / "out"):
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 128 + number, output
    assert "continue with --resume" in output
    assert losses(tmp_path / "out")[-1][1] == saved_steps(tmp_path / "out")[-1] > 50


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, text):
    given = options(tmp_path, text, "--steps", "100000", "--save-every", "50")
    process = start(given)
    out = tmp_path / "out"
    while process.poll() is None and not saved_steps(out):
        time.sleep(0.05)
    # No file may grow beyond 100 bytes from now on, as if the disk were full.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, 100))
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "--resume continues" in output
    reached = saved_steps(out)[-1]
    more = ["--steps", str(reached + 1), "--save-every", "50"]
    config = out / "config.json"
    # A run of another length is another run: what was saved fits this one.
    config.write_text(config.read_text().replace(" 100000", f" {reached + 1}"))
    finish(start([*options(tmp_path, text, *more), "--resume"]))
    rows = losses(out)
    assert [step for kind, step, _ in rows if kind == "train"] == list(
        range(1, reached + 2)
    )


@pytest.mark.slow
def test_a_directory_that_cannot_be_made_is_refused(tmp_path, text):
    (tmp_path / "out").write_text("a file")
    process = start(options(tmp_path, text, "--steps", "1"))
    output = process.communicate()[0].decode()
    assert process.returncode == 2, output
    assert output.startswith("error: --output:")
    assert (tmp_path / "out").read_text() == "a file"
