"""Model sizes, from seconds on a laptop to a pod. Parameters exclude nothing.

`nano` to `small` are byte-level test and laptop models; from `124m` on the
shapes are those of the usual GPT-2/Llama ladders with SwiGLU and bfloat16.
"""

from typing import Any

from lm.errors import UserError, did_you_mean

_BYTES = 256  # the built-in byte tokenizer
_GPT2 = 50304  # 50257 rounded up to a multiple of 128


def _size(n, d, h, f, v, t, b, g=None, **more) -> dict[str, Any]:
  return {
    'model': {
      'num_layers': n,
      'd_model': d,
      'num_heads': h,
      'num_kv_heads': g or h,
      'head_dim': d // h,
      'd_ff': f,
      'vocab_size': v,
      **more,
    },
    'seq_len': t,
    'batch_size': b,
  }


_LARGE = {
  'dtype': 'bfloat16',
  'remat': 'dots',
  'scan_layers': True,
  'loss_chunk': 1024,
}

SIZES = {
  #             layers   d  heads  d_ff  vocab  seq_len batch
  'debug': _size(2, 32, 2, 64, _BYTES, 32, 8),
  'nano': _size(2, 64, 4, 176, _BYTES, 128, 16),
  'micro': _size(4, 96, 4, 256, _BYTES, 128, 16),
  'tiny': _size(4, 128, 4, 512, _BYTES, 256, 16),
  'small': _size(6, 384, 6, 1536, _BYTES, 256, 12),
  '124m': _size(12, 768, 12, 2048, _GPT2, 1024, 512, dtype='bfloat16',
                loss_chunk=1024),
  '350m': _size(24, 1024, 16, 2816, _GPT2, 1024, 512, **_LARGE),
  '1b': _size(24, 2048, 16, 5504, _GPT2, 2048, 512, **_LARGE),
  '3b': _size(28, 3072, 24, 8192, _GPT2, 4096, 512, g=8, **_LARGE),
  '7b': _size(32, 4096, 32, 11008, _GPT2, 4096, 1024, g=8, **_LARGE),
}  # fmt: skip


def size(name: str) -> dict[str, Any]:
  """Returns the overrides of `configs/base.py` for a size, as nested dicts."""
  if name not in SIZES:
    raise UserError(f"size '{name}' does not exist.{did_you_mean(name, SIZES)}")
  return SIZES[name]
