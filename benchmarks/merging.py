r"""Time and memory of a merge, against reading and against other mergers.

  python -m benchmarks.merging
  python -m benchmarks.merging --max_mib=128 --layers=2

Eight checkpoints of a 124M float32 model are made in a temporary folder (8 GB),
as Orbax items with our chunks and as safetensors. Every measurement is a new
process: seconds inside it, without imports, and the growth of its peak memory.
All are measured in turn; ratios are those of a turn, to one thread that reads
the same bytes into one small buffer (a merge has two threads). The row with
SHA-256 of what names the inputs (of safetensors: all bytes) and fsync is what
launch.merge --inputs does; of a run it compares fingerprints, too, in the row
with these. Cold: the files are dropped from the page cache before. Warm: they
are in it, and what a result takes was just used: a virtual machine gives memory
that is not used back to its host, and to get it again is no part of a merge.
Lower is better.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import orbax.checkpoint as ocp
from absl import flags

from benchmarks import results
from launch import cli
from lm import checkpoint
from lm.errors import UserError
from tests import helpers

_MAX_MIB = flags.DEFINE_integer('max_mib', 256, 'the bound', lower_bound=1)
_REPEAT = flags.DEFINE_integer('repeat', 5, 'medians of so many', lower_bound=1)
_LAYERS = flags.DEFINE_integer('layers', 12, 'of the model', lower_bound=1)
_PARTS = flags.DEFINE_list(
  'parts', ['cold', 'warm', 'memory'], 'what to measure'
)
_COUNT = 8
_KEPT = 'with SHA-256, until on disk'
_ROW = '{:<41}{:>9}{:>23}{:>11}'

# One process: argv = what, max_bytes, output, inputs.
_WORK = """
import json, pathlib, sys, time
import numpy as np
from merging.engine import artifact, items, memory, stream
what, bound, out, *inputs = sys.argv[1:]
def peak():
  text = pathlib.Path('/proc/self/status').read_text()
  return int(text.split('VmHWM:')[1].split()[0]) << 10
def read():
  buffer = memoryview(bytearray(1 << 20))
  for folder in inputs:
    for path in pathlib.Path(folder).rglob('*'):
      if path.is_file():
        with path.open('rb', buffering=0) as f:
          while f.readinto(buffer):
            pass
def decode():
  for folder in inputs:
    path = pathlib.Path(folder)
    meta = items.metadata(path)
    for name in items.leaves(meta):
      array = items.open_leaf(path, meta, name, items.context())
      rows = array.chunk_layout.read_chunk.shape[0]
      for i in range(0, array.shape[0], rows):
        array[i:min(i + rows, array.shape[0])].read().result()
def ours():
  memory.reuse()  # as launch.merge does
  sources = [(p, 1 / len(inputs)) for p in inputs]
  stream.merge(sources, out, max_bytes=int(bound))
def kept():
  memory.reuse()
  sources = [(p, 1 / len(inputs)) for p in inputs]
  about = artifact.provenance(out, sources, method={})
  artifact.write_at(
    pathlib.Path(out), '', sources=sources, provenance=about,
    max_bytes=int(bound))
def verified():
  memory.reuse()
  like = items.Item(pathlib.Path(inputs[0]))
  shapes = {k: like.open(k, items.context()).shape for k in like.leaves}
  def observe(path, leaf, index, block):
    verify.block_fingerprint(block, index, shapes[leaf])
  sources = [(p, 1 / len(inputs)) for p in inputs]
  stream.merge(sources, out, max_bytes=int(bound), observe=observe)
def loop(library):
  name = 'model.safetensors'
  total = {}
  for folder in inputs:
    for key, x in library.load_file(f'{folder}/{name}').items():
      x = x * (1 / len(inputs))
      total[key] = total[key] + x if key in total else x
  pathlib.Path(out).mkdir()
  library.save_file(total, f'{out}/{name}')
def torch_loop():
  import safetensors.torch as library
  loop(library)
def numpy_loop():
  import safetensors.numpy as library
  loop(library)
if what == 'torch_loop':
  import safetensors.torch
if what == 'verified':
  from lm import verify
before, begin = peak(), time.perf_counter()
globals()[what]()
print(json.dumps([time.perf_counter() - begin, peak() - before]))
"""


@results.entry('time and memory of merges')
def main() -> None:
  for part in _PARTS.value:
    if part not in ('cold', 'warm', 'memory'):
      raise UserError(f"--parts='{part}' is none of cold, warm, memory.")
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    orbax, tensors = _checkpoints(folder)
    size = sum(p.stat().st_size for p in _files(orbax))
    print(f'{_COUNT} checkpoints, {size / 2**30:.2f} GiB as Orbax items.')
    print(_ROW.format('', 'seconds', 'x reading', 'peak, MiB'))
    rows = _rows(orbax, tensors)
    for part in (x for x in _PARTS.value if x != 'memory'):
      print(part)
      _report(rows, folder, part == 'cold')
    if 'memory' in _PARTS.value:
      print(f'memory by the number of checkpoints, bound {_MAX_MIB.value} MiB')
      counts = {n: _links(orbax, n, folder) for n in (2, 8, 32)}
      rows = [
        (f'merge of {n}, Orbax', 'ours', x, i)
        for i, (n, x) in enumerate(counts.items())
      ]
      _report(rows, folder, cold=False)


def _rows(orbax, tensors):
  """(title, what, inputs, row of the reading that it is compared with)."""
  rows = [
    ('read the Orbax files', 'read', orbax, 0),
    ('read and decode them, TensorStore', 'decode', orbax, 0),
    ('merge, Orbax', 'ours', orbax, 0),
    (f'  {_KEPT}', 'kept', orbax, 0),
    ('  with fingerprints, as of a run', 'verified', orbax, 0),
    ('read the safetensors files', 'read', tensors, 5),
    ('merge, safetensors', 'ours', tensors, 5),
    (f'  {_KEPT}', 'kept', tensors, 5),
  ]
  for what in ('numpy_loop', 'torch_loop'):
    if _installed(what):
      rows.append((f'load, add, save: {what}', what, tensors, 5))
    else:
      print(f'  {what} is left out: its libraries are not installed')
  return rows


def _checkpoints(folder):
  rng = np.random.default_rng(0)
  base = {k: rng.standard_normal(s, np.float32) for k, s in _shapes().items()}
  orbax, tensors = [], []
  for i in range(_COUNT):
    tree = {
      k: x + 0.05 * rng.standard_normal(x.shape, np.float32)
      for k, x in base.items()
    }
    orbax.append(folder / f'orbax/{i}/params')
    save_args = {
      k: ocp.SaveArgs(chunk_byte_size=checkpoint.CHUNK_BYTES) for k in tree
    }
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
      args = ocp.args.PyTreeSave(tree, save_args=save_args)
      checkpointer.save(orbax[-1], args)
    tensors.append(folder / f'tensors/{i}')
    tensors[-1].mkdir(parents=True)
    _save(tensors[-1] / 'model.safetensors', tree)
  os.sync()
  return orbax, tensors


def _shapes():
  """GPT-2 small: 124M parameters in matrices, head tied."""
  shapes = {'embed': (50304, 768), 'positions': (1024, 768)}
  for i in range(_LAYERS.value):
    shapes |= {
      f'layer_{i}.qkv': (768, 2304),
      f'layer_{i}.out': (768, 768),
      f'layer_{i}.up': (768, 3072),
      f'layer_{i}.down': (3072, 768),
      f'layer_{i}.norm': (768,),
    }
  return shapes


def _save(path, tree):
  header, end = {}, 0
  for key, x in tree.items():
    span, end = [end, end + x.nbytes], end + x.nbytes
    header[key] = {'dtype': 'F32', 'shape': x.shape, 'data_offsets': span}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # as the library does
  with path.open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    for x in tree.values():
      f.write(x.data)


def _links(paths, count, folder):
  """The same bytes under other names: `count` checkpoints on little disk."""
  links = []
  for i in range(count):
    links.append(folder / f'links-{count}/{i}/params')
    source = paths[i % len(paths)]
    for path in source.rglob('*'):
      if path.is_file():
        link = links[-1] / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, link)
  return links


def _files(paths):
  return [p for folder in paths for p in folder.rglob('*') if p.is_file()]


def _report(rows, folder, cold):
  """Measures all rows in turn and prints them."""
  turns = [
    [_measure(what, inputs, folder, cold) for _, what, inputs, _ in rows]
    for _ in range(_REPEAT.value)
  ]
  for i, (title, _, _, base) in enumerate(rows):
    seconds = statistics.median(turn[i][0] for turn in turns)
    ratios = [turn[i][0] / turn[base][0] for turn in turns]
    found = results.spread(ratios) if base != i else ''
    peak = max(turn[i][1] for turn in turns) / 2**20
    print(_ROW.format(f'  {title}', f'{seconds:.2f}', found, f'{peak:.0f}'))


def _measure(what, inputs, folder, cold):
  os.sync()  # what the row before wrote is no part of this one
  for path in _files(inputs):
    with path.open('rb') as f:
      if cold:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
      else:
        while f.read(1 << 24):
          pass
  if not cold:
    with tempfile.TemporaryFile(dir=folder) as f:
      twice = sum(p.stat().st_size for p in _files(inputs[:2]))
      for _ in range(0, twice, 1 << 24):  # twice, as imports take some of it
        f.write(bytes(1 << 24))
  with tempfile.TemporaryDirectory(dir=folder) as out:
    done = subprocess.run(
      [sys.executable, '-c', _WORK, what, str(_MAX_MIB.value << 20),
       f'{out}/out', *map(str, inputs)],
      cwd=helpers.ROOT,
      check=True,
      capture_output=True,
      text=True,
    )  # fmt: skip
  return json.loads(done.stdout.splitlines()[-1])


def _installed(what):
  module = {'numpy_loop': 'numpy', 'torch_loop': 'torch'}[what]
  code = f'import safetensors.{module}'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True)
  return done.returncode == 0


if __name__ == '__main__':
  cli.run(main)
