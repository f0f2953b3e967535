"""Steps for accelerators that are not here: lowered, not compiled or run."""

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import pytest

from configs import base
from lm import loop, programs, spec


def _lowered(monkeypatch, platforms, choice='', **model):
  """Returns the StableHLO of a step as on a machine with that accelerator."""
  backend = 'gpu' if 'cuda' in platforms else platforms[0]
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  config = base.get_config(f'size=debug{choice}')
  config.model.update({'num_layers': 1, **model})
  traced = programs.trace(config, loop.build(config))
  return traced.lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize('name', spec.names('optimizers'))
def test_every_step_has_rules_for_gpu_and_tpu(monkeypatch, name):
  """A decomposition without a rule for one of them raises here."""
  text = _lowered(monkeypatch, ('cuda', 'tpu'), f',optimizer={name}')
  assert 'stablehlo.dot_general' in text


@pytest.mark.parametrize(
  'model', [{}, {'remat': 'full', 'scan_layers': True, 'num_kv_heads': 1}]
)
def test_half_precision_on_a_gpu_takes_cudnn_both_ways(monkeypatch, model):
  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(cudnn, 'check_compute_capability', lambda *_: True)
  half = {'dtype': 'bfloat16', 'head_dim': 64, **model}
  text = _lowered(monkeypatch, ('cuda',), **half)
  # XLA asks back for the calls of each device; elsewhere nothing does so.
  forward = 2 if 'remat' in model else 1
  assert text.count('@CustomSPMDPartitioning(') == forward + 1


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_single_precision_takes_xla(monkeypatch, platform):
  text = _lowered(monkeypatch, (platform,))
  assert 'stablehlo.custom_call' not in text
