"""Prints what each optimizer and decay mode subtracts from a parameter x.

  python -m launch.decay_table

Nothing is looked up: each entry of the table is measured, with the learning
rate lr, its peak and the weight decay wd. README.md contains the output.
"""

from rich import console

from launch import cli


def main() -> None:
  from launch.parts import decay_formulas  # jax: late, so that --help is fast

  with console.Console(stderr=True).status('measuring every optimizer'):
    table = decay_formulas.table()
  print(table)


if __name__ == '__main__':
  cli.run(main)
