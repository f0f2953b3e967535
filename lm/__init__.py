"""The language-model trainer: model, data, step, loop, checkpoints, logs.

Shape suffixes used in this package, one capital letter per dimension:

  B batch (sequences)     T time (tokens)        S = T + 1 (inputs + target)
  D d_model               F feed-forward width   V vocabulary
  H query heads           G key/value heads      K head dimension
  N layers                E validation sequences L = B * T (flattened tokens)
  R = H / G               I, O sides of a matrix
"""
