"""The loader's benchmark runs and says what it measured; no time is asserted."""

import json

from scripts.bench import loader, measure
from scripts.bench.__main__ import main


def test_loader_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(loader, "step_seconds", lambda device, batch: 1.0)
    assert main(["loader", "images=6", "batch=4", "stream=50"]) == 0
    found = json.loads((tmp_path / "loader.json").read_text())
    assert [row["native_pixels"] for row in found["cached"]] == [32, 96, 480]
    assert found["hardware"]["cpu"]
    stream = found["stream"]
    assert stream["images"] == 50
    assert stream["mebibytes_after_images"][-1][1] > stream["mebibytes_before"] > 0
