"""One trainer for every device that torch computes on; platforms differ by a record of facts, not by code."""

import logging

# On import bitsandbytes looks for a fused CPU kernel in a hub package and warns that it is absent. This family never
# uses that kernel (it is the one that loses gradients), so its absence is no news to a user.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
