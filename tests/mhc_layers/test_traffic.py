"""The traffic calculator: the published counts, and the same bytes as the fused operators say they move."""

from __future__ import annotations

import pytest

from mhc_layers.cli import main
from mhc_layers.kernels.cost import bytes_moved
from mhc_layers.training.traffic import connection_traffic


def channels(n: int) -> dict[tuple[str, str], int]:
    return {(row.direction, row.name): row.channels for row in connection_traffic(n)}


def test_bytes_at_four_streams():
    """In units of C bytes for bfloat16, except the paper's table, which is in elements (2C + C against 34C)."""
    rows = connection_traffic(4)
    assert [row.num_bytes(1) for row in rows if row.direction == "forward"] == [6, 68, 36, 28, 20]
    assert [row.channels for row in rows if row.direction == "forward"][:2] == [2 + 1, 34]
    assert [row.num_bytes(1) for row in rows if row.direction == "backward"] == [6, 118, 78, 56, 48, 30]
    assert [row.num_bytes(1) for row in rows if row.direction == "recompute"] == [12]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_the_operators_move_what_the_table_says(n):
    """With so many channels that coefficients and one ``phi`` do not show."""
    tokens, dim = 2**20, 2**20
    moved = {
        step: round(bytes_moved(step, tokens, n, dim) / (2 * tokens * dim), 2)
        for step in (
            "pre_forward",
            "post_forward",
            "post_backward",
            "pre_backward",
            "boundary_forward",
            "boundary_read_forward",
            "boundary_backward",
        )
    }
    table = channels(n)
    assert moved["pre_forward"] + moved["post_forward"] == table["forward", "separate kernels"]
    assert moved["boundary_forward"] == table["forward", "fused boundary, then read"]
    assert moved["boundary_read_forward"] == table["forward", "single pass (floor)"]
    assert moved["post_backward"] + moved["pre_backward"] == table["backward", "three phases"]
    assert moved["boundary_backward"] == table["backward", "three phases, chained"]


def test_no_streams_are_refused():
    with pytest.raises(ValueError, match="num_streams is 0"):
        connection_traffic(0)


def test_inspect_prints_the_table_of_a_configuration(capsys):
    assert main(["inspect", "--io", "--recipe", "small_gpu", "--dim", "4096", "--bandwidth", "3.35e12"]) == 0
    shown = capsys.readouterr().out
    assert "n = 4, C = 4096, 24 sites" in shown
    for words in ("(8n+2)C", "(2n+2)C", "20C", "1,966,080", "0.587"):  # 20 * 4096 * 24 bytes a token; 1e6 of them
        assert words in shown, words
