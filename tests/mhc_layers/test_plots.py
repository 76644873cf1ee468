"""Figures: made from a log alone, for every kind of run."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from mhc_layers import plots
from mhc_layers.training.metrics import MetricsLog


def write_log(folder, *, sites=6, n=4, signed=False, monitor=True):
    generator = np.random.default_rng(0)
    with MetricsLog(folder) as log:
        for step in range(1, 30):
            log.write("train", step, bits_per_byte=8.0 / step if step != 5 else float("nan"))
        log.write("eval", 10, bits_per_byte=3.0)
        if monitor:
            gain = generator.uniform(0.5, 1.5, sites)
            values = {
                f"{group}{way}_gain_{end}": gain + (end == "max")
                for group in ("site/", "composite/prefix_", "composite/suffix_")
                for way in ("forward", "backward")
                for end in ("min", "max")
            }
            matrices = generator.uniform(-1.0 if signed else 0.0, 1.0, (sites, n, n))
            streams = {
                f"streams/{name}": gain for name in ("cosine_mean", "cosine_min", "difference", "effective_streams")
            }
            log.write("monitor", 20, mean_h_res=matrices, mean_composite=matrices[0], **values, **streams)
    return folder


@pytest.mark.parametrize(("n", "signed", "sites"), [(4, False, 6), (1, False, 1), (6, True, 40)])
def test_every_figure_is_drawn(tmp_path, n, signed, sites):
    paths = plots.plot_run(write_log(tmp_path, n=n, signed=signed, sites=sites))
    assert [path.name for path in paths] == ["loss.png", "gains.png", "maps.png", "streams.png"]
    for path in paths:
        image = imread(path)
        assert image.shape[0] > 200 and image.std() > 0.01


def test_a_run_without_measurements_has_its_loss(tmp_path):
    assert [path.name for path in plots.plot_run(write_log(tmp_path, monitor=False))] == ["loss.png"]


def test_comparison_draws_all_runs(tmp_path):
    folders = [write_log(tmp_path / name, monitor=name != "b") for name in ("a", "b")]
    assert imread(plots.plot_comparison(folders, tmp_path / "figures" / "x.png")).std() > 0.01


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics"):
        plots.plot_run(tmp_path)
