"""Loops of machine code, in small: what is counted in them, and where they are found."""

import pytest

from tools.verify_kernels.loops import loops_of

# What nvdisasm prints, shortened: a loop whose wait for a barrier was moved behind the end of the kernel.
WARPGROUPS = """
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], RZ, !UPT ;
.L_x_1:
	//## File "/a/forward.py", line 12
        /*0010*/                   DEPBAR.LE SB0, 0x4 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR10], R1 ;
        /*0040*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
	//## File "/a/parts.py", line 7
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, R164, gdesc[UR16].tnspB, R24, gsb0 ;
        /*0060*/                   MUFU.EX2 R225, R152 ;
        /*0070*/                   DEPBAR.LE SB0, 0x2 ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   MUFU.EX2 R2, R3 ;
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR10], R1 ;
        /*00c0*/              @!P1 BRA `(.L_x_3) ;
        /*00d0*/                   BRA `(.L_x_2) ;
"""


def test_a_loop_holds_what_was_moved_out_of_the_way_and_no_more() -> None:
    (loop,) = loops_of(WARPGROUPS, num_warps=8, threads_of_warp=32)
    assert loop.multiply_adds == {"HGMMA": 2 * 64 * 128 * 16}
    assert loop.exponentials == 2 * 8 * 32
    assert loop.in_flight == 2
    assert loop.lines["forward.py", 12] == 4
    assert loop.lines["parts.py", 7] == 8


@pytest.mark.parametrize(
    ("product", "multiply_adds"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R6, R4 ;", {"HMMA": 4 * 16 * 8 * 16}),
        ("HMMA.1688.F32.TF32 R4, R8, R6, R4 ;", {"HMMA": 4 * 16 * 8 * 8}),
        (
            "UMOV UR9, 0x8210490 ;\n UTCHMMA tmem[UR2], gdesc[UR6], tmem[UR7], tmem[UR8], idesc[UR9], UPT ;",
            {"UTCHMMA": 128 * 128 * 16},
        ),
        ("v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]", {"v_mfma": 4 * 32 * 32 * 8}),
    ],
)
def test_products_of_every_architecture(product: str, multiply_adds: dict[str, int]) -> None:
    jump = "s_cbranch_scc1 .LBB0_1" if product.startswith("v_") else "@P0 BRA `(.LBB0_1) ;"
    once = f".LBB0_1:\n {product}\n {jump}\n"
    (loop,) = loops_of(once, num_warps=4, threads_of_warp=32)
    assert loop.multiply_adds == multiply_adds
    assert loop.in_flight is None
    nested = f".LBB0_0:\n {product}\n{once} {jump.replace('_1', '_0')}\n"
    assert loops_of(nested, num_warps=4, threads_of_warp=32) == [loop], "the innermost"
