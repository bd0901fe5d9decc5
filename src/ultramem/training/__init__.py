"""Training on OLMo-core's Trainer: config, optimizer groups, schedules, checkpoints, metrics."""

import logging

# OLMo-core warns about missing GPU libraries when it is imported, and python prints warnings of loggers without a
# handler. A run sends this logger to its own train.log.
logging.getLogger("olmo_core").addHandler(logging.NullHandler())
