"""Counting of collectives in program text, against numbers by hand."""

import pytest

from benchmarks import collectives
from benchmarks.collectives import Moved, Sizes

HLO = """
  %a = (f32[256,96]{1,0}, bf16[10]{0}) all-reduce(%x, %y), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_1'}, to_apply=%add
  %b = f32[80]{0} all-gather(%x), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  %c = f32[10]{0} reduce-scatter(%x), replica_groups={{0,1},{2,3}}, dimensions={0}
  %d = f32[80]{0} all-gather-start(%x), replica_groups=mesh['axis_0'=8] {'axis_0'}
  %e = f32[80]{0} all-gather-done(%d)
  %f = f32[] add(%x, %y)
"""  # noqa: E501


def test_every_way_to_write_groups():
  found = collectives.collectives(HLO)
  assert found == {
    ('all-reduce', 4): Moved(1, 1.5 * (256 * 96 * 4 + 20)),
    ('all-gather', 8): Moved(2, 2 * 7 / 8 * 320),
    ('reduce-scatter', 2): Moved(1, 40.0),  # of 80 bytes that are summed
  }
  with pytest.raises(ValueError, match='no groups of devices'):
    collectives.collectives('%a = f32[2]{0} all-reduce(%x), to_apply=%add')


@pytest.mark.parametrize(
  ('mesh', 'want'),
  [
    ({'data': 8}, 2 * 7 / 8 * 400),
    ({'fsdp': 8}, 7 / 8 * 400 + 7 / 8 * 400),  # gathered, scattered
    ({'data': 2, 'fsdp': 4}, 2 * 3 / 4 * 400 + 100),
    # 10 sums of 4 x 64 / 4 bytes; of gradients, half of the parameters each.
    ({'data': 4, 'tensor': 2}, 2 * 3 / 4 * 200 + 10 * 64),
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 2 / 2 * 200 + 100 + 10 * 64),
    ({'data': 8, 'zero': 3}, 7 / 8 * 400 + 7 / 8 * 400),  # as fsdp
  ],
)
def test_formulas_by_hand(mesh, want):
  sizes = Sizes(parameters=100, matrices=80, layers=2, activations=64)
  assert sum(collectives.formula(sizes, mesh, False).values()) == want


def test_matrices_by_hand():
  sizes = Sizes(parameters=100, matrices=80, layers=2, activations=64)
  found = lambda **mesh: collectives.formula(sizes, mesh, True)['matrices']
  assert found(fsdp=8) == 2 * 7 / 8 * 320 / 8  # there and back
  assert found(data=8) == 7 / 8 * 320  # the results
  assert found(data=2, tensor=4) == 2 * 3 / 4 * 320 / 8 + 1 / 2 * 320 / 4
