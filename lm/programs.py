"""Compiled programs of a run: made beside its start, shared by many runs."""

import contextlib
import json
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm import card, origin, step, width


def statics(config: ConfigDict) -> str:
  """Returns a text that is equal for configs whose programs are the same.

  It has all fields but the seed and the numbers that a step is given, and the
  code and tables that a step reads.
  """
  found = {**card.as_dict(config), 'code': origin.code(config)}
  found['factors'] = width.factors(config)  # may depend on a float, baked in
  for name, value in {'seed': 0, **step.floats(config)}.items():
    if isinstance(value, dict):
      for knob in value:
        del found[name][knob]
    else:
      del found[name]
  return json.dumps(found, sort_keys=True)


def trace(config: ConfigDict, built: Any) -> jax.stages.Traced:
  """Traces the step, without compiling it: raises what its code raises."""
  shape, kind = (config.batch_size, config.seq_len + 1), np.int32
  batch = jax.ShapeDtypeStruct(shape, kind, sharding=built.batch_sharding)
  with jax.set_mesh(built.mesh):
    return built.train_step.trace(built.abstract, batch, step.floats(config))


def compiled_beside(config: ConfigDict, built: Any) -> Callable[..., Any]:
  """Compiles the step in a thread, beside the initial state; returns the step.

  Takes a third off a cold start. Not for accelerators, whose compilers time
  kernels, which must run alone. Call the step under `jax.set_mesh(built.mesh)`.
  """

  def compile_step():
    with contextlib.suppress(Exception), jax.set_mesh(built.mesh):
      # What is raised here is raised again, and reported, by the call below.
      trace(config, built).lower().compile()

  thread = threading.Thread(target=compile_step)
  thread.start()

  def train_step(*args):
    thread.join()
    return built.train_step(*args)

  return train_step
