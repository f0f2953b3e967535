r"""EVERY knob of a run, with its default, unit and meaning.

  python -m launch.train --config=configs/base.py:size=tiny,optimizer=muon \
      --workdir=runs/a --config.learning_rate=2e-3 --config.optimizer.b2=0.99

Behind the colon stand the choices that decide which other knobs exist: size,
optimizer and schedule. The knobs of an optimizer or schedule are the keywords
of its function: see `optimizers/<name>.py`.
"""

from ml_collections import ConfigDict

from configs import sizes
from lm import spec


def get_config(arg: str = '', **defaults: str) -> ConfigDict:
  default = {'size': 'tiny', 'optimizer': 'adamw', 'schedule': 'wsd'}
  choice = spec.parse(arg, **{**default, **defaults})
  c = ConfigDict()

  # --- length and size of the run
  c.seed = 0  # initial parameters and order of the data
  c.num_steps = 1000  # optimizer updates
  c.batch_size = 16  # sequences per update, over all devices (set by size)
  c.seq_len = 256  # tokens per sequence (set by size)
  c.grad_accum_steps = 0  # slices of the batch; 0 = as fits this device

  # --- what is studied
  # Peak; the schedule multiplies it. sgdw, adafactor, prodigy state their own.
  c.learning_rate = spec.learning_rate(choice['optimizer'], 3e-3)
  c.optimizer = spec.spec('optimizers', choice['optimizer'])
  c.schedule = spec.spec('schedules', choice['schedule'])
  c.normalize_decay = False  # weight_decay / sqrt(num_steps): 1711.05101, B.1
  c.follow = ''  # 'weight_decay=0,b1=0.95': at multiplier 0 (lm/follow.py)
  c.clip_norm = 1.0  # global l2 norm of the gradient; 0 = no clipping
  c.z_loss = 0.0  # weight of mean(logsumexp(logits)^2); 1e-4 is typical
  c.spectral_penalty = 0.0  # weight of (s^2 - 1)^2, s matrices' largest values
  c.project = ''  # 'nap': matrices keep their first norm (parts/nap.py)
  c.linearity = 0.0  # weight of 1 - cosine of blocks' inputs and outputs
  c.qk_clip = 0.0  # bound of attention scores (lm/qk_clip.py); 100 is typical

  # --- the model (set by size)
  c.model = ConfigDict()
  c.model.num_layers = 4
  c.model.d_model = 128
  c.model.num_heads = 4
  c.model.num_kv_heads = 4  # fewer than num_heads = grouped-query attention
  c.model.head_dim = 32
  c.model.d_ff = 512  # width of the feed-forward layer
  c.model.activation = 'silu'  # its function: 'silu', 'gelu' or 'relu2'
  c.model.gated = True  # times a second projection: with 'silu', SwiGLU
  c.model.vocab_size = 256  # 256 = bytes
  c.model.rope_theta = 10_000.0  # base of the rotary position embedding
  c.model.qk_norm = False  # RMSNorm of queries and keys per head
  c.model.tie_embeddings = False  # one matrix for embedding and head
  c.model.logit_softcap = 0.0  # cap * tanh(logits / cap); 0 = off, 30 typical
  c.model.norm_eps = 1e-6
  c.model.init = ''  # or 'orthogonal', 'zero', 'isometric' (initializers.py)
  c.model.init_std = 0.02  # residual outputs are divided by sqrt(2 num_layers)
  c.model.base_width = 0  # muP: d_model of the run that was tuned; 0 = off
  c.model.base_head_dim = 0  # its head_dim, if that differs; 0 = the same
  c.model.dtype = 'float32'  # of the computation; parameters are float32
  c.model.scan_layers = False  # True compiles one layer, for deep models
  c.model.remat = 'none'  # 'none', 'dots' (keep matmuls) or 'full'
  c.model.attention = 'auto'  # 'auto', 'chunked' (CPU), 'xla' or 'cudnn'
  c.model.loss_chunk = 0  # tokens per slice of the loss; 0 = all logits at once

  # --- width rule, with model.base_width: lm/width.py, launch.coord_check
  c.width = ConfigDict()
  c.width.lr_power = -1.0  # of matrices' rates; some methods state theirs
  c.width.decay = 'sqrt'  # of matrices; 'constant', 'independent' (see there)
  c.width.embedding_decay = 1.0  # factor of its weight decay; 0 in 2510.15262
  c.width.head_decay = 1.0  # the same of the head

  _surroundings(c)
  c.update(ConfigDict(sizes.size(choice['size'])))
  return c.lock()


def _surroundings(c: ConfigDict) -> None:
  """Adds what a run reads, writes and runs on."""
  # --- data
  c.data = ConfigDict()
  c.data.source = 'python_source'  # or 'text' (files) or 'bin' (token shards)
  c.data.train = ''  # glob of the training files of 'text' and 'bin'
  c.data.eval = ''  # glob of the validation files of 'text' and 'bin'
  c.data.order = ''  # by score: 'ascend' (best last), 'descend'; '' = shuffled
  c.data.score = ''  # 'compressibility', or 'file': FILE.score.npy beside each
  c.data.order_begin = 0  # step from which on the data are sorted, and ...
  c.data.order_end = 0  # ... the step at which that ends; shuffled elsewhere

  # --- validation, on a fixed set of sequences
  c.eval = ConfigDict()
  c.eval.every_steps = 100  # 0 = only at the end
  c.eval.num_sequences = 128  # the same ones in every run that is compared
  c.eval.batch_size = 32  # sequences at a time
  c.eval.merged = ''  # averages: 'linear:400,lawa:6,ema:0.1' (lm/online.py)

  # --- checkpoints and logs
  c.checkpoint = ConfigDict()
  c.checkpoint.every_steps = 100
  c.checkpoint.keep_latest = 0  # newest kept, beside that of a stop; 0 = all
  c.checkpoint.keep_every_steps = 0  # kept for ever beside those; 0 = none
  c.checkpoint.mean = True  # mean of the parameters between two checkpoints
  c.checkpoint.moment = False  # and weighted by time: exact slopes in between
  c.checkpoint.ema = ''  # power EMAs, by relative width; '0.05,0.1' is typical
  c.log_nuclear_norm = False  # grad/nuclear, for launch.refine; slow (SVD)
  c.log_every_steps = 1  # steps between two lines of metrics.jsonl
  c.diagnostics = False  # per role: decay, norms, bounds (lm/diagnostics.py)
  c.max_bad_steps = 10  # non-finite steps in a row until status 'diverged'

  # --- where the run starts (empty = from scratch)
  c.branch = ''  # 'runs/a@1000': continue that run's parameters and optimizer
  c.branch_data = 'continue'  # or 'restart': begin the data order again
  c.branch_state = ''  # of another optimizer: 'discard', 'keep' or 'carry_mu'
  c.init = ''  # 'runs/a@1000' or 'runs/a/merged/x': parameters only
  c.init_state = False  # and the state of a merge made with --state

  # --- devices: sizes of the mesh axes; -1 = all that remain
  c.mesh = ConfigDict()
  c.mesh.data = -1  # data parallel: each device a slice of the batch
  c.mesh.fsdp = 1  # data parallel with parameters sharded as well
  c.mesh.tensor = 1  # heads, feed-forward width and vocabulary sharded
  # ZeRO: 1 optimizer state spread over data, 2 gradients, 3 parameters as well
  c.mesh.zero = 0
