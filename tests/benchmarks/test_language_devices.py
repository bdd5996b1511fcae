"""The language program on several devices and in several processes."""

import numpy as np
import pytest

from tests.benchmarks.language_runs import losses, options, start, text as text


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=4,fsdp=2", "fsdp=8"])
def test_losses_on_several_devices_are_those_of_one(tmp_path, text, mesh):
    more = ["--batch-size", "16", "--dim", "16", "--steps", "20", "--seed", "1"]
    flags = "--xla_force_host_platform_device_count=8"
    rows = []
    for name, extra in (("one", []), ("many", ["--mesh", mesh])):
        path = tmp_path / name
        path.mkdir()
        process = start([*options(path, text, *more), *extra], XLA_FLAGS=flags)
        output = process.communicate()[0].decode()
        assert process.returncode == 0, output
        rows.append([r[2] for r in losses(path / "out")])
    assert len(rows[0]) == 21
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-5)
