"""The textual mutants of the kernels follow the kernels."""

from __future__ import annotations

import pytest

from tests.mutation.kernels import KERNEL_MUTANTS, KernelMutant


@pytest.mark.parametrize(
    "mutant", KERNEL_MUTANTS, ids=lambda mutant: f"{mutant.path.rpartition('/')[2]}: {mutant.after}"
)
def test_a_mutant_is_another_text_of_its_file(mutant: KernelMutant) -> None:
    assert mutant.source()
