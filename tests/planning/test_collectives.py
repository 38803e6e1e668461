from srrl_jax.planning.collectives import array_bytes, bytes_by_kind, collectives, largest_array

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_cond (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner (p: (s32[])) -> (s32[]) {
  %reduced = f32[8,4]{1,0} all-reduce(%x), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%outer_cond (p: (s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[])) -> (s32[]) {
  %loop = (s32[]) while(%t), condition=%inner_cond, body=%inner
  %gathered = (bf16[4,64]{1,0}, bf16[16,64]{1,0}) all-gather-start(%w), replica_groups=[2,4]<=[8]
  %done = bf16[16,64]{1,0} all-gather-done(%gathered)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %scan = (s32[]) while(%t), condition=%outer_cond, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %cut = f32[2,4]{1,0} reduce-scatter(%g), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  ROOT %moved = u8[100]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
}
"""


def test_what_is_in_loops_counts_as_often_as_it_runs():
    found = {c.kind: c for c in collectives(TEXT)}
    assert found["all-reduce"].runs == 15 and found["all-reduce"].loops == ("outer", "inner")
    assert found["all-gather"].runs == 5 and found["all-gather"].arrays == ("bf16[16,64]",)
    assert found["reduce-scatter"].runs == 1 and found["reduce-scatter"].loops == ()


def test_bytes_are_those_of_ring_algorithms():
    """Of D bytes among g devices: gather and scatter send (g - 1) / g of the whole, a sum twice that."""
    assert bytes_by_kind(collectives(TEXT)) == {
        "all-reduce": 15 * 2 * 128 * 1 / 2,
        "all-gather": 5 * 2048 * 3 / 4,
        "reduce-scatter": 4 * 32 * 3 / 4,
        "collective-permute": 100,
    }


def test_the_largest_array():
    assert largest_array(TEXT) == "bf16[16,64]"
    assert array_bytes("f8e4m3fn[10]") == 10 and array_bytes("pred[3,3]") == 9 and array_bytes("s4[8]") == 4
