"""Imported once by the server that ranks are forked from: all that they need is then in memory."""

import torch
from clts import language_model

torch.set_num_threads(1)  # a process with threads must not be forked
language_model("gpt2", torch.float32)
