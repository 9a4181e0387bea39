"""What the hardware can do, as far as its description tells."""

import pytest
import torch

from engine import device


@pytest.mark.parametrize(
    "limit, flags, expected",
    [
        (None, dict(avx2=True, avx512_bf16=True), True),
        (None, dict(amx_bf16=True, avx512_bf16=False), True),
        (None, dict(avx2=True, avx512_f=True, avx512_bf16=False), False),
        ("AVX2", dict(amx_bf16=True), False),
        ("avx512_core", dict(avx512_bf16=True), False),
        ("AVX512_CORE_BF16", dict(avx512_bf16=True), True),
        ("ALL", dict(avx512_bf16=True), True),
    ],
)
def test_a_cpu_multiplies_bfloat16_where_its_instructions_are_there_and_allowed(
    limit, flags, expected, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert device.multiplies_bfloat16(None) == expected
