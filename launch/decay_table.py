"""Prints what each optimizer and decay mode subtracts from a parameter x.

  python -m launch.decay_table

Nothing is looked up: each entry of the table is measured, with the learning
rate lr, its peak and the weight decay wd. README.md contains the output.
"""

import sys

from rich import console

from launch import cli


def main() -> None:
  from launch.parts import decay_formulas  # jax: late, so that --help is fast
  from lm import spec

  with console.Console(stderr=True).status('measuring every optimizer'):
    names, others = decay_formulas.split(spec.names('optimizers'))
    table = decay_formulas.table(names)
  print(table)
  if others:
    print(
      f'Left out, without one of {", ".join(decay_formulas.NEEDED)}: '
      f'{", ".join(others)}.',
      file=sys.stderr,
    )


if __name__ == '__main__':
  cli.run(main)
