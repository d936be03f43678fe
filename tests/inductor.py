"""Inductor as tests want it: no vector instructions, and no compiler run that asks for them; the same graph in two thirds."""

import torch._inductor.config

QUICK_INDUCTOR = torch._inductor.config.patch({"cpp.simdlen": 0, "cpp.vec_isa_ok": True})
