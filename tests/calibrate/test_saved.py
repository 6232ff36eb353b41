"""The state of a calibration on disk."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from v4export.calibrate.saved import Progress, Saved


def full(_, mode):
    return open("/dev/full", mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    saved, progress = Saved(tmp_path / "state", "key"), Progress(1, [{"x": torch.zeros(1 << 18)}], {})
    saved.write(progress)
    with monkeypatch.context() as patch:
        patch.setattr("v4export.calibrate.saved.open", full, raising=False)
        with pytest.raises(OSError) as caught:
            saved.write(progress)
    assert caught.value.errno == errno.ENOSPC
    found = saved.read()
    assert found is not None and found.done == 1 and [p.name for p in tmp_path.iterdir()] == ["state"]
