"""plan/hlo.py on compiled programs with known costs, and on text of the TPU and GPU compilers."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.plan.hlo import Program
from qwenvl_jax.sharding import make_mesh

LAYERS, N = 5, 64


def program(f, *args) -> Program:
    return Program(jax.jit(f).lower(*args).compile().as_text())


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_a_loop_counts_as_often_as_it_runs():
    read = program(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], shape(N, N), shape(LAYERS, N, N))
    assert read.flops == LAYERS * 2 * N**3
    assert [times for _, times in read.runs if times > 1] == [LAYERS]


def test_loops_within_loops():
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x)

    read = program(
        lambda x, w: jax.lax.scan(lambda x, w: (inner(x, w), None), x, w)[0], shape(N, N), shape(LAYERS, N, N)
    )
    assert read.flops == 3 * LAYERS * 2 * N**3


def test_a_loop_of_unknown_length_is_refused():
    read = program(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), shape(N))
    with pytest.raises(ValueError, match="no trip count"):
        _ = read.flops


def test_only_what_a_slice_picks_is_read():
    """Stacked weights: only the layer that a step uses."""
    whole = LAYERS * N * N * 4
    read = program(lambda x, w: x * w[2], shape(N, N), shape(LAYERS, N, N))
    assert 3 * N * N * 4 <= read.bytes < whole


def test_an_update_in_place_moves_what_is_new():
    f = jax.jit(lambda cache, new, at: jax.lax.dynamic_update_slice(cache, new, (at, 0)), donate_argnums=0)
    text = f.lower(shape(4096, N), shape(1, N), shape(dtype=jnp.int32)).compile().as_text()
    assert Program(text).bytes < 16 * N


def test_collectives():
    mesh = make_mesh(tensor=8)
    place = {axes: NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "tensor"), ("tensor", None))}
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=place[None, "tensor"])
    w = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=place["tensor", None])
    read = Program(jax.jit(jnp.matmul, out_shardings=place[()]).lower(x, w).compile().as_text())
    (sum_,) = read.collectives
    assert (sum_.kind, sum_.group, sum_.times) == ("all-reduce", 8, 1)
    assert sum_.bytes == 2 * 64 * 64 * 4 * 7 // 8
    assert read.flops == 2 * 64 * 64 * 64  # per device


# Text of the TPU and GPU compilers, shortened.
TPU = """
%region (a: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %b = f32[]{:T(128)} add(%a, %a)
}

%body (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %copy = bf16[8,16]{0,1:T(8,128)(2,1)} copy(%x)
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%i, %copy)
}

%condition (arg.1: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %arg.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (q: bf16[256,4,7,128], k: bf16[8192,4,128,1], x: bf16[8,16]) -> f32[4,256,7,8192] {
  %q = bf16[256,4,7,128]{3,0,2,1:T(8,128)(2,1)S(1)} parameter(0)
  %k = bf16[8192,4,128,1]{2,0,1,3:T(8,128)(2,1)} parameter(1)
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%zero, %x.1)
  %while.1 = (s32[], /*index=1*/bf16[8,16]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %slice-start = ((bf16[8,16]{1,0:T(8,128)}), bf16[1,16]{1,0:T(1,128)S(1)}, s32[]{:S(2)}) slice-start(%x.1)
  %all-reduce = bf16[8,16]{1,0:T(8,128)S(1)} all-reduce(%x.1), \
replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, to_apply=%region
  %mask = s8[1,2,2]{2,1,0} constant({...})
  %splash_mha_fwd_segmented.1 = bf16[256,4,7,128]{3,2,1,0:T(8,128)(2,1)} custom-call(%mask, %q, %q), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof": 1
}}, metadata={op_name="jit(f)/causal/splash_mha_fwd"}
  %attend.1 = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[8192,4,128,1]{2,0,1,3:T(8,128)(2,1)}) custom-call(%x.1, %k), \
custom_call_target="tpu_custom_call", output_to_operand_aliasing={{1}: (1, {})}, backend_config={"custom_call_config": \
{"body":"TUz=","cost_estimate":{"flops":"1000","transcendentals":"7","bytes_accessed":"3000"}}}
  ROOT %scores = f32[4,256,7,8192]{3,1,2,0:T(8,128)} convolution(%q, %k), \
window={size=4x1 stride=3x1 lhs_dilate=4x1}, dim_labels=b01f_o0i1->0b1f
}
"""


def test_a_tpu_program():
    read = Program(TPU)
    main, body = read.computations["main"], read.computations["body"]
    assert read.trips(main["while.1"]) == 28
    scores = 2 * 4 * 256 * 7 * 8192 * 128  # the batch of 4 is a spatial dimension; zeros between rows do not count
    kernel = 2 * 2 * 256 * 4 * 7 * 128 * 7 // 2
    assert read.flops == scores + kernel + 1000
    assert read.traffic("main", main["attend.1"]) == 3000  # as the kernel states; it updates k in place
    # Padding of [8, 16] to tiles: 16 columns become 128; if rows change fastest, 8 rows become 128.
    assert read.traffic("body", body["copy"]) == 2 * (8 * 128 + 16 * 128)
    assert read.traffic("main", main["slice-start"]) == 2 * 128  # the destination is in vector memory
    assert (
        read.traffic("main", main["scores"]) == 2 * 8192 * 4 * 128 + 4 * 4 * 256 * 7 * 8192
    )  # q is in vector memory too
    (sum_,) = read.collectives
    assert (sum_.group, sum_.bytes) == (4, 2 * 8 * 128 * 2 * 3 // 4)


GPU = """
%fused (parameter_0: bf16[3,64,32], parameter_1: bf16[1,64]) -> bf16[1,32] {
  %parameter_0 = bf16[3,64,32]{2,1,0} parameter(0)
  %slice.1 = bf16[1,64,32]{2,1,0} slice(%parameter_0), slice={[1:2], [0:64], [0:32]}
  %bitcast.1 = bf16[64,32]{1,0} bitcast(%slice.1)
  %parameter_1 = bf16[1,64]{1,0} parameter(1)
  ROOT %dot.1 = bf16[1,32]{1,0} dot(%parameter_1, %bitcast.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (w: bf16[3,64,32], x: bf16[1,64], q: bf16[1,256,4,80]) -> bf16[1,32] {
  %w = bf16[3,64,32]{2,1,0} parameter(0)
  %x = bf16[1,64]{1,0} parameter(1)
  %q = bf16[1,256,4,80]{3,2,1,0} parameter(2)
  %pallas_call.2 = bf16[1,256,4,80]{3,2,1,0} custom-call(%q, %q, %q), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/full/jit(mha)/mha_forward/pallas_call"}
  ROOT %gemm_fusion_dot = bf16[1,32]{1,0} fusion(%w, %x), kind=kCustom, calls=%fused
}
"""


def test_a_gpu_program():
    read = Program(GPU)
    assert read.flops == 2 * 64 * 32 + 2 * 2 * 256 * 4 * 80 * 256
    assert read.bytes == 2 * (64 * 32 + 64 + 32) + 2 * 4 * 256 * 4 * 80
