"""The walk of a scheduled program: loops are multiplied out, kernels and collectives counted."""

import pytest

from ctllm_jax.plan import hlo

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %m = bf16[8,128]{1,0} multiply(%p, %p)
}

%inner_body (t: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %t = (s32[], bf16[8,128]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%t), index=1
  %f.1 = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/a"}, backend_config={"estimated_cycles":"10"}
}

%inner_cond (t: (s32[], bf16[8,128])) -> pred[] {
  %t = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (t: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %t = (s32[], bf16[8,128]{1,0}) parameter(0)
  %w = (s32[], bf16[8,128]{1,0}) while(%t), condition=%inner_cond, body=%inner_body
  %k.2 = bf16[8,128]{1,0} custom-call(%w), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/kernel"}
  %g = bf16[16,128]{1,0} all-gather(%k.2), replica_groups={{0,1}}, dimensions={0}
}

%cond (t: (s32[], bf16[8,128])) -> pred[] {
  %t = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %ne = pred[] compare(%i, %i), direction=NE
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %c = bf16[8,128]{1,0} copy(%a), metadata={op_name="jit(step)/copy"}, backend_config={"estimated_cycles":"7"}
  %w = (s32[], bf16[8,128]{1,0}) while(%c), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %r = (f32[8]{0}, f32[2,8]{1,0}) all-reduce-start(%w), to_apply=%fused
  ROOT %d = (f32[8]{0}, f32[2,8]{1,0}) all-reduce-done(%r)
}
"""  # noqa: E501


def test_loops_are_multiplied_out():
    found = hlo.totals(PROGRAM)
    assert found.cycles == 7 + 4 * 3 * 10
    assert found.by_operation == {"jit(step)/a": 120, "jit(step)/copy": 7} | dict.fromkeys(
        found.by_operation.keys() - {"jit(step)/a", "jit(step)/copy"}, 0
    )
    assert found.kernels == {"k": 4}
    assert found.collectives == {"all-gather": 4 * 16 * 128 * 2, "all-reduce": 8 * 4 + 16 * 4}
    assert found.collective_calls == {"all-gather": 4, "all-reduce": 1}
    assert found.unknown_loops == 0


def test_a_loop_of_unknown_length_is_counted_once_and_reported():
    found = hlo.totals(PROGRAM.replace(', backend_config={"known_trip_count":{"n":"4"}}', ""))
    assert (found.cycles, found.unknown_loops) == (7 + 30, 1)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.totals("HloModule empty")
