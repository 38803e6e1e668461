import pytest

from srrl_jax.planning.collectives import (
    array_bytes,
    bytes_by_kind,
    bytes_outside,
    collectives,
    largest_array,
)
from srrl_jax.planning.groups import share_outside

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

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


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups={}", (tuple(range(8)),)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'c'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", ((3, 2), (1, 0))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
    ],
)
def test_who_takes_part(written, groups):
    (found,) = collectives(TEXT.replace("replica_groups={{0,1},{2,3}}", written))[:1]
    assert found.kind == "all-reduce" and found.groups == groups


def test_what_leaves_an_island():
    """Of rings the part of one member; with pairs all of it; each device has something for each other one."""
    across, within = ((0, 1, 4, 5), (2, 3, 6, 7)), ((0, 1), (2, 3))
    assert share_outside("all-gather", across, ici_group_size=4) == 1 / 2
    assert share_outside("all-to-all", across, ici_group_size=4) == 1 / 2
    assert share_outside("all-gather", ((0, 1, 2, 3, 4, 5, 6, 7),), ici_group_size=4) == 1 / 4
    assert share_outside("all-to-all", ((0, 1, 2, 3, 4, 5, 6, 7),), ici_group_size=2) == 3 / 4
    assert share_outside("collective-permute", ((0, 1), (3, 4)), ici_group_size=4) == 1
    assert (
        share_outside("all-reduce", within, ici_group_size=2) == share_outside("all-reduce", across, 8) == 0
    )
    # Gathered in fours, reduced in pairs, permuted between 0 and 1.
    assert bytes_outside(collectives(TEXT), ici_group_size=2) == (5 * 2048 + 4 * 32) * 3 / 4 / 2
    assert bytes_outside(collectives(TEXT), ici_group_size=4) == 0


def test_between_slices_libtpu_writes_host_transfers():
    """Of a program for one slice of 8 devices: the first of each slice add up, the second, and so on."""
    names = '_xla_megascale_target="{0,1}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"'
    line = "  %r = (f32[24,8]{1,0}, u32[], token[]) recv(%token), channel_id=5, frontend_attributes={" + names
    (found,) = (c for c in collectives(TEXT.replace("  %done", line + "}\n  %done")) if len(c.groups) == 8)
    assert found.arrays == ("f32[24,8]",) and found.runs == 5
    assert found.groups == tuple((i, i + 8) for i in range(8))
    assert bytes_outside([found], ici_group_size=8) == found.bytes * 5 == 5 * 24 * 8 * 4


def test_of_the_branches_of_a_condition_one_runs():
    """The layer of which some states are read, and the others: the one that sends more is counted."""
    branch = """
%some (p: (f32[1])) -> (f32[1]) {
  %few = f32[2,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%every (p: (f32[1])) -> (f32[1]) {
  %many = f32[64,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%outer (p: (s32[])) -> (s32[]) {
  %either = (f32[1]) conditional(%i, %a, %b), branch_computations={%some, %every}"""
    found = collectives(TEXT.replace("\n%outer (p: (s32[])) -> (s32[]) {", branch))
    assert [(c.arrays, c.runs) for c in found if c.kind == "all-reduce"] == [
        (("f32[64,4]",), 5),
        (("f32[8,4]",), 15),
    ]


def test_libtpu_fuses_a_sum_and_a_cut_into_a_scatter():
    text = """HloModule m, num_partitions=4

%all-reduce-scatter.1 (a: bf16[8,4], b: bf16[4,4]) -> (bf16[8,1], bf16[4,1]) {
  %sum = (bf16[8,4]{1,0}, bf16[4,4]{1,0}) all-reduce(%a, %b), replica_groups={{0,1,2,3}}, to_apply=%add
  %first = bf16[8,4]{1,0} get-tuple-element(%sum), index=0
  %cut = bf16[8,1]{1,0} dynamic-slice(%first, %c, %p), dynamic_slice_sizes={8,1}
}

ENTRY %main (p: bf16[8,4]) -> bf16[8,1] {
  %f = (bf16[8,1]{1,0}, bf16[4,1]{1,0}) fusion(%p, %q), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (found,) = collectives(text)
    assert (found.kind, found.arrays) == ("reduce-scatter", ("bf16[8,1]", "bf16[4,1]"))
    assert bytes_by_kind([found]) == {"reduce-scatter": (8 + 4) * 2 * 3}


def test_the_largest_array():
    assert largest_array(TEXT) == "bf16[16,64]"
    assert array_bytes("f8e4m3fn[10]") == 10 and array_bytes("pred[3,3]") == 9 and array_bytes("s4[8]") == 4
