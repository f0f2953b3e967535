r"""Checks that a width rule works: numbers over width, slopes, a picture.

  python -m launch.coord_check --config=configs/debug.py --widths=32,64,128 \
      --config.model.base_width=32
  python -m launch.coord_check --config=configs/debug.py --widths=32,64,128 \
      --of=singular_values --num_steps=400 --config.learning_rate=1e-2

--of=activations: RMS after num_steps and of their change, which a rule such as
muP keeps alike at all widths (slope 0; 2203.03466, appendix D.1).
--of=singular_values: the top one of each matrix (2510.15262). Runs are short,
at the peak learning rate; d_ff and heads grow with d_model. Writes no run.
"""

from absl import flags

from launch import cli
from lm.errors import UserError, did_you_mean

_DEFAULT = 'configs/debug.py'
_CONFIG = cli.define_config()
_WIDTHS = flags.DEFINE_list('widths', ['32', '64', '128'], 'values of d_model')
_NUM_STEPS = flags.DEFINE_integer('num_steps', 10, 'of each run', 1)
_OF = flags.DEFINE_string('of', 'activations', 'or singular_values')
_GROW = flags.DEFINE_string('grow', 'heads', 'or head_dim')
_OUT = flags.DEFINE_string('out', 'runs/coord_check.png', 'the picture')

_TITLES = {
  'activations': ('RMS after the last step', 'RMS of the change'),
  'singular_values': ('top singular value before', 'top singular value after'),
}


def main() -> None:
  out, widths = cli.picture(_OUT.value), _widths()
  if _OF.value not in _TITLES:
    hint = did_you_mean(_OF.value, _TITLES)
    raise UserError(f"--of='{_OF.value}' does not exist.{hint}")
  from launch.parts import show
  from launch.parts import widths as lib
  from lm import model, width

  configs = [lib.at_width(_CONFIG.value, w, _GROW.value) for w in widths]
  measure = getattr(lib, _OF.value)
  for c in configs:
    model.build(c.model)  # refuses before anything is said of it
    print(f'd_model {c.model.d_model}: width rule: {width.describe(c)}')
  numbers = [measure(lib.train(c, _NUM_STEPS.value)) for c in configs]
  panels = dict(
    zip(_TITLES[_OF.value], zip(*numbers, strict=True), strict=True)
  )
  for title, found in panels.items():
    rows = []
    for kind in found[0]:
      values = [x[kind] for x in found]
      rows.append([kind, *(f'{v:.4g}' for v in values),
                   f'{lib.slope(widths, values):+.2f}'])  # fmt: skip
    show.table([title, *map(str, widths), 'slope'], rows)
  if _OF.value == 'singular_values':
    print(_memory(configs))
  show.save(lib.draw(widths, panels), out)
  print(f'wrote {out}')
  rule = _CONFIG.value.model.base_width
  base = 0 if rule else widths[0]
  print(
    f'Next: the same with{"out" if rule else ""} a rule, '
    f'--config.model.base_width={base}'
  )


def _widths() -> list[int]:
  for text in _WIDTHS.value:
    if not text.strip().isdecimal() or int(text) < 1:
      raise UserError(f"--widths: '{text}' is not a width.")
  widths = [int(text) for text in _WIDTHS.value]
  if len(set(widths)) < 2:
    raise UserError(
      f'--widths={",".join(_WIDTHS.value)} must be two or more different '
      'positive numbers.'
    )
  return sorted(set(widths))


def _memory(configs) -> str:
  """Says how much of the initial values is forgotten."""
  from lm import step, width

  optimizer, rates = configs[0].optimizer, []
  mode = optimizer.get('decay')
  if mode in ('none', 'coupled') or 'weight_decay' not in optimizer:
    return 'No decoupled weight decay forgets the initial values.'
  for c in configs:
    lr, wd = width.factors(c)['matrix']
    wd *= float(step.knobs(c, 0, step.floats(c))['weight_decay'])
    rates.append(wd if mode == 'independent' else c.learning_rate * lr * wd)
  times = [_NUM_STEPS.value * r for r in rates]
  text = ', '.join(f'{t:.2g}' for t in times)
  more = f' (all would, after {3 / min(rates):.0f} steps)' if min(rates) else ''
  return (
    f'steps x shrinkage of a step by weight decay: {text}; from about 3 on, '
    f'decay and not the initial values decide the spectra{more}'
  )


if __name__ == '__main__':
  cli.run(main, _DEFAULT)
