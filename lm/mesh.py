"""Devices: processes, the mesh, and what lies where on it."""

import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lm import axes as axes_lib
from lm.errors import UserError

# Dense bf16 peak in FLOP/s per device, from the vendors' data sheets.
PEAK_FLOPS = {
  'NVIDIA A100': 312e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H100 NVL': 835e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H200': 989e12,
  'NVIDIA H200 NVL': 835e12,
  'NVIDIA B200': 2250e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5p': 459e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
}


def initialize(
  coordinator: str = '', num_processes: int = 0, process_id: int = -1
) -> None:
  """Joins the processes of one run; call once, before anything touches jax.

  The first that applies: 1. the arguments; 2. what jax detects by itself: a
  SLURM step or Open MPI 4 with several tasks, a TPU VM; 3. a single process.

  Raises:
    UserError: incomplete arguments, or a cluster that jax cannot read.
  """
  more = {'shutdown_timeout_seconds': 60}  # how long a failure lets others wait
  if coordinator:
    address = re.fullmatch(r'(\[[\da-fA-F:]+\]|[^\s:/]+):(\d+)', coordinator)
    if not address or not 1 <= int(address[2]) <= 65535:
      raise UserError(
        f"--coordinator='{coordinator}' must be HOST:PORT, with a port from 1 "
        'to 65535.'
      )
    if num_processes < 1 or not 0 <= process_id < num_processes:
      raise UserError(
        f'--coordinator needs --num_processes >= 1 and 0 <= --process_id < '
        f'num_processes, not {num_processes} and {process_id}.'
      )
    more |= {'cluster_detection_method': 'deactivate'}
    jax.distributed.initialize(coordinator, num_processes, process_id, **more)
  elif num_processes or process_id != -1:
    raise UserError('--num_processes and --process_id need a --coordinator.')
  elif _several() or _tpu_vm():
    if os.getenv('SLURM_STEP_TASKS_PER_NODE', '').partition('(')[0] == '1':
      more |= {'local_device_ids': []}  # all: jax would take the first one only
    try:
      jax.distributed.initialize(**more)
    except ValueError as e:
      if _several():
        raise UserError(
          f'Several processes were started, but jax cannot join them ({e}); '
          'give --coordinator, --num_processes and --process_id.'
        ) from e


def _several() -> bool:
  """Whether SLURM, Open MPI or Kubernetes on TPUs started several processes."""
  env = os.environ
  workers = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
  return (
    ('SLURM_STEP_NODELIST' in env and int(env.get('SLURM_NTASKS', '1')) > 1)
    or int(env.get('OMPI_COMM_WORLD_SIZE', '1')) > 1
    or int(env.get('MEGASCALE_NUM_SLICES', '1')) > 1
    or ',' in (workers or '')
  )


def _tpu_vm() -> bool:
  """Whether this is a TPU VM, perhaps of a pod, which its metadata tells jax.

  `import jax` has set TPU_SKIP_MDS_QUERY where there is no TPU.
  """
  return (
    importlib.util.find_spec('libtpu') is not None
    and 'TPU_SKIP_MDS_QUERY' not in os.environ
    and 'tpu' in (os.getenv('JAX_PLATFORMS') or 'tpu')
  )


def make(config: ConfigDict) -> Mesh:
  """Returns the mesh of `config.mesh`; a size of -1 takes what remains."""
  sizes = {k: v for k, v in config.items() if k != 'zero'}
  n = jax.device_count()
  free = [k for k, v in sizes.items() if v == -1]
  known = math.prod(v for v in sizes.values() if v != -1)
  if len(free) == 1 and known > 0 and n % known == 0:
    sizes[free[0]] = n // known
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != n:
    text = ', '.join(f'mesh.{k}={config[k]}' for k in sizes)
    raise UserError(
      f'{text} does not make {n} devices; legal: positive sizes whose product '
      f'is {n}, one of them may be -1.'
    )
  # Auto: flax's logical constraints do not work with jax's default, Explicit.
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
  )


def param_shardings(mesh: Mesh, axes: Any, params: Any) -> Any:
  """Returns a NamedSharding per parameter.

  Raises:
    UserError: a dimension that its mesh axis does not divide.
  """
  specs = axes_lib.partition_specs(axes)

  def check(path, spec, leaf):
    for name, size in zip(spec, leaf.shape, strict=True):
      if name and size % mesh.shape[name]:
        raise UserError(
          f'mesh.{name}={mesh.shape[name]} does not divide a dimension of size '
          f'{size} of parameter {jax.tree_util.keystr(path)}.'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(check, specs, params)


def state_shardings(mesh: Mesh, axes: Any, state: Any, zero: int = 0) -> Any:
  """Returns a NamedSharding per leaf of an abstract train state.

  Moments and means lie like the parameter they belong to, counters everywhere.
  What has another shape, as SOAP's factors, is spread over the axes over which
  its parameter is, each along the first dimension that it divides.
  zero, the stage of ZeRO (1910.02054, section 5), spreads over `data` as well:
  1 moments and means, 2 gradients (`gradient_shardings`), 3 parameters.
  """
  if zero not in range(4):
    raise UserError(f'mesh.zero={zero} is no stage of ZeRO. Legal: 0 to 3.')
  shardings = param_shardings(mesh, axes, state.params)
  replicated = NamedSharding(mesh, P())
  found = axes_lib.like_params(
    state, state.params, shardings, replicated, factor_sharding
  )
  fields = ('opt_state', 'mean', 'averages', 'params')[: (0, 3, 3, 4)[zero]]
  return found.replace(
    **{k: _spread(getattr(found, k), getattr(state, k)) for k in fields}
  )


def factor_sharding(sharding: NamedSharding, leaf: Any) -> NamedSharding:
  """Returns that of a leaf that belongs to a parameter and has another shape.

  Args:
    sharding: of the parameter.
    leaf: with a shape.
  """
  found = NamedSharding(sharding.mesh, P())
  for axis in filter(None, sharding.spec):
    found = _along(found, leaf, axis)
  return found


def gradient_shardings(mesh: Mesh, axes: Any, params: Any, zero: int) -> Any:
  """Returns a NamedSharding per gradient from stage 2 on, else None."""
  if zero < 2:
    return None
  return _spread(param_shardings(mesh, axes, params), params)


def _spread(shardings: Any, leaves: Any) -> Any:
  """Adds the data axis to the first dimension of each leaf that it divides."""
  one = lambda sharding, leaf: _along(sharding, leaf, 'data')
  return jax.tree.map(one, shardings, leaves)


def _along(sharding: NamedSharding, leaf: Any, axis: str) -> NamedSharding:
  """Adds a mesh axis to the first dimension of a leaf that it divides.

  By the leaf's own shape, so that factors of any rank are safe. The axis comes
  last: what a device gets is a part of the shard that it had without.
  """
  mesh, size = sharding.mesh, leaf.shape
  spec = [*sharding.spec] + [None] * (len(size) - len(sharding.spec))
  for i, names in enumerate(spec):
    names = (names,) if isinstance(names, str) else names or ()
    names = (*names, axis)
    if size[i] and size[i] % math.prod(mesh.shape[n] for n in names) == 0:
      spec[i] = names
      return NamedSharding(mesh, P(*spec))
  return sharding


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sequences are split over the data and fsdp axes."""
  return NamedSharding(mesh, P(axes_lib.RULES['batch']))


def check_batch(mesh: Mesh, name: str, size: int, accum: int = 1) -> None:
  """Refuses a batch that cannot be split over devices and accumulation."""
  devices = math.prod(mesh.shape[a] for a in axes_lib.RULES['batch'])
  if accum < 0:
    raise UserError(f'grad_accum_steps={accum} must be at least 0.')
  accum = max(accum, 1)
  if size < 1 or size % (devices * accum):
    raise UserError(
      f'{name}={size} must be a positive multiple of {devices * accum} = '
      f'{devices} (mesh data x fsdp) x {accum} (slices of the batch).'
    )


def device_bytes(tree: Any) -> int:
  """Returns what a device holds of a tree of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def check_memory(state: Any) -> None:
  """Refuses a state that no device of this process can hold.

  XLA would wait for ever on a CPU. What a step needs beside it is not counted.

  Raises:
    UserError: with both sizes.
  """
  need, device = device_bytes(state), jax.local_devices()[0]
  has = (device.memory_stats() or {}).get('bytes_limit', need)
  if device.platform == 'cpu':
    pages = os.sysconf('SC_PHYS_PAGES') // jax.local_device_count()
    has = pages * os.sysconf('SC_PAGE_SIZE')
  if need > has:
    raise UserError(
      f'the parameters, optimizer state and averages need {need / 2**30:.1f} '
      f'GiB per device, which has {has / 2**30:.1f} GiB; see --dry_run.'
    )


def peak_flops() -> float | None:
  """Returns the bf16 peak of all devices together, None if not known."""
  kind = jax.devices()[0].device_kind
  # The longest name that fits: 'TPU v5 lite' before 'TPU v5'.
  for name in sorted(PEAK_FLOPS, key=len, reverse=True):
    if kind.startswith(name):
      return PEAK_FLOPS[name] * jax.device_count()
  return None


def single() -> Mesh:
  """Returns a mesh of this process's first device: notebooks, small tools."""
  return jax.make_mesh(
    (1, 1, 1),
    ('data', 'fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 3,
    devices=jax.local_devices()[:1],
  )
