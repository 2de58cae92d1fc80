"""An optimised program's text, read by hand."""

import pytest

from spa_jax import chips
from spa_jax.compiler.hlo import Program, arrays
from spa_jax.errors import UserError

# A scan over three layers, as XLA writes it: a transfer that hides in two fusions (one chain), a
# product in the loop, a product outside, an update in place and a copy that is written to memory.
# ruff: noqa: E501
TEXT = """HloModule jit_f, entry_computation_layout={()->f32[]}

%start (p.0: bf16[8,16]) -> bf16[64,16] {
  %p.0 = bf16[8,16]{1,0} parameter(0)
  ROOT %ag.1 = bf16[64,16]{1,0} all-gather(%p.0), channel_id=1, dimensions={0}, frontend_attributes={chain_id="4"}
}

%done (p.1: bf16[8,16]) -> bf16[64,16] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  ROOT %ag.2 = bf16[64,16]{1,0} all-gather(%p.1), channel_id=1, dimensions={0}, frontend_attributes={chain_id="4"}
}

%turned (p.2: bf16[4,32]) -> bf16[4,32] {
  %p.2 = bf16[4,32]{1,0} parameter(0)
  ROOT %copy.1 = bf16[4,32]{0,1} copy(%p.2)
}

%tile (p.3: bf16[4,32]) -> bf16[4,32] {
  %p.3 = bf16[4,32]{1,0} parameter(0)
  %inner = bf16[4,32]{0,1} fusion(%p.3), kind=kLoop, calls=%turned
  ROOT %add.1 = bf16[4,32]{0,1} add(%inner, %inner)
}

%cond (c.0: (s32[], bf16[8,16])) -> pred[] {
  %c.0 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%c.0), index=0
  ROOT %lt = pred[] compare(%i, %three), direction=LT
}

%body (b.0: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %b.0 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %w = bf16[8,16]{1,0} get-tuple-element(%b.0), index=1
  %f.1 = bf16[64,16]{1,0} fusion(%w), kind=kCustom, calls=%start, backend_config={"estimated_cycles":"100"}
  %f.2 = bf16[64,16]{1,0} fusion(%w), kind=kCustom, calls=%done, backend_config={"estimated_cycles":"9223372036854775807"}
  %x = bf16[5,64]{1,0} constant({...})
  %y = bf16[5,16]{1,0} convolution(%x, %f.2), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"20"}
  %rs = f32[8,16]{1,0} reduce-scatter(%f.2), channel_id=2, dimensions={0}, to_apply=%sum
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%w, %w)
}

ENTRY %main (a.0: bf16[8,16]) -> f32[] {
  %a.0 = bf16[8,16]{1,0} parameter(0)
  %k = bf16[4,32]{1,0} constant({...})
  %loop = (s32[], bf16[8,16]{1,0}) while(%a.0), condition=%cond, body=%body
  %kept = bf16[4,32]{0,1} fusion(%k), kind=kLoop, calls=%tile
  %written = bf16[4,32]{0,1} fusion(%k), kind=kLoop, calls=%turned
  %left = f32[7,2,3]{2,1,0} constant({...})
  %right = f32[3,9]{1,0} constant({...})
  %z = f32[7,2,9]{2,1,0} dot(%left, %right), lhs_contracting_dims={2}, rhs_contracting_dims={0}
  %ar = (f32[10]{0}, f32[]) all-reduce(%z, %z), channel_id=3, to_apply=%sum, backend_config={"estimated_cycles":"7"}
  ROOT %r = f32[] constant(0)
}
"""


def test_what_loops_run_counts_as_often_as_they_do():
    program = Program(TEXT)
    assert program.times["body"] == 3 and program.times["start"] == 3
    assert program.cycles == 3 * (100 + 20) + 7
    # 2 x result x summed: 5 x 16 x 64 in each of three layers, and 7 x 2 x 9 x 3 once.
    assert program.flops == 3 * 2 * 5 * 16 * 64 + 2 * 7 * 2 * 9 * 3


def test_a_transfer_that_hides_in_several_fusions_counts_once():
    found = Program(TEXT).collectives
    assert [(c.kind, c.dtype, c.size, c.times, c.in_loop) for c in found] == [
        # of the reduce-scatter's operand, bf16[64,16], and its float32 result the larger counts
        ("all-reduce", "f32", 2 * 7 * 2 * 9 * 4, 1, False),
        ("reduce-scatter", "f32", 64 * 16 * 2, 3, True),
        ("all-gather", "bf16", 64 * 16 * 2, 3, True),
    ]
    assert Program(TEXT).collective_bytes == 1008 + 3 * 2048 + 3 * 2048
    assert Program(TEXT).by_kind()["all-gather"] == 3 * 2048


def test_only_a_copy_that_is_written_to_memory_is_one():
    assert Program(TEXT).copies(4 * 32) == 1  # `written`; the one in `tile` is a part of a sum
    assert Program(TEXT).copies(4 * 33) == 0


CACHE = """HloModule jit_decode

%fused_copy (param_0: f32[4,2,8,32]) -> f32[4,2,8,32] {
  %param_0 = f32[4,2,8,32]{3,2,1,0} parameter(0)
  ROOT %copy.9 = f32[4,2,8,32]{2,1,3,0} copy(%param_0)
}

%fused_scores (param_0: f32[4,2,8,32]) -> f32[4,32] {
  %param_0.1 = f32[4,2,8,32]{3,2,1,0} parameter(0)
  %copy.8 = f32[4,2,8,32]{2,1,3,0} copy(%param_0.1)
  ROOT %dot.1 = f32[4,32]{1,0} dot(%copy.8, %copy.8)
}

ENTRY %main (p: f32[4,2,8,32]) -> f32[4,2,8,32] {
  %p = f32[4,2,8,32]{3,2,1,0:T(8,128)} parameter(0)
  %copy.1 = f32[4,2,8,32]{2,1,3,0:T(8,128)} copy(%p)
  %transpose.2 = f32[4,2,32,8]{3,2,1,0} transpose(%copy.1), dimensions={0,1,3,2}
  %copy-start.3 = (f32[4,2,8,32]{3,2,1,0}, f32[4,2,8,32]{3,2,1,0}, u32[]) copy-start(%p)
  %fetch.6 = (f32[4,2,8,32]{3,2,1,0:T(8,128)S(1)}, f32[4,2,8,32]{3,2,1,0:T(8,128)}, u32[]) copy-start(%p)
  %back.7 = (f32[4,2,8,32]{3,2,1,0:T(8,128)}, f32[4,2,8,32]{3,2,1,0:T(8,128)S(1)}, u32[]) copy-start(%p)
  %turned.8 = (f32[4,2,8,32]{3,2,1,0:T(8,128)}, f32[4,2,8,32]{2,3,1,0:T(8,128)S(1)}, u32[]) copy-start(%p)
  %small = f32[2,2,8,32]{3,2,1,0} copy(%p)
  %fusion.4 = f32[4,2,8,32]{2,1,3,0} fusion(%p), kind=kLoop, calls=%fused_copy
  %scores = f32[4,32]{1,0} fusion(%p), kind=kOutput, calls=%fused_scores
  ROOT %scatter.5 = f32[4,2,8,32]{3,2,1,0} scatter(%p, %p, %p)
}
"""


def test_copies_of_a_layers_cache_are_counted_by_hand():
    """A layer has 4 x 2 x 8 x 32 keys: copy.1, transpose.2, copy-start.3, fusion.4, turned.8.

    `fetch.6` brings it into the chip's own memory, and `back.7` from there, as it lies.
    """
    program = Program(CACHE)
    assert program.copies(4 * 2 * 8 * 32) == 5
    assert program.copies(2 * 2 * 8 * 32) == 1  # %small
    assert program.copies(3 * 2 * 8 * 32) == 0


def test_a_product_over_windows_multiplies_what_lies_inside_them():
    """How a TPU writes x [4096, 3072] times w [24, 128, 3072]: 24 windows, one of them inside."""
    line = (
        "ENTRY %m (a: bf16[1]) -> bf16[1] {\n"
        "  %x = bf16[4096,3072,1]{1,0,2} parameter(0)\n"
        "  %w = bf16[24,128,3072]{2,1,0} parameter(1)\n"
        "  ROOT %y = bf16[4096,24,128]{2,0,1} convolution(%x, %w), window={size=24 pad=23_23 "
        "rhs_reversal=1}, dim_labels=bf0_0oi->b0f\n}\n"
    )
    assert Program(line).flops == 2 * 4096 * 3072 * 24 * 128


def test_the_arrays_of_a_shape():
    text = "(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[], u8[5]{0}, /*index=3*/f8e4m3fn[4])"
    assert [(n, size) for _, n, size in arrays(text)] == [(6, 12), (1, 4), (5, 5), (4, 4)]


def test_a_topology_names_its_chip():
    assert chips.of("v5p:2x2x1").hbm_gib == chips.CHIPS["v5p"].hbm_gib
    for wrong in ("v5e", "v5e:", "v5e:2xtwo", "h100:8", ""):
        with pytest.raises(UserError, match=r"v5e:4x4 or v5p:2x2x2; the chips are v4, v5e"):
            chips.of(wrong)
