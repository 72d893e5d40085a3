"""Which compiled kernels the tests of this folder launched. conftest.py has this file run last."""

from __future__ import annotations

import ptx
import pytest


@pytest.mark.skipif(ptx.nvcc() is None, reason="not run: no nvcc")
def test_every_kernel_is_launched(whole_folder: bool) -> None:
    if not whole_folder:
        pytest.skip("not run: only a part of tests/cuda was selected")
    missing = ptx.library_kernels() - set(ptx.interpreter().ptx_launched().split())
    names = "\n".join(ptx.readable(sorted(missing)))
    assert not missing, f"no case of tests/cuda launches these {len(missing)} kernels:\n{names}"
