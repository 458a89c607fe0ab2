"""One trainer for every device that torch computes on; platforms differ by a record of facts, not by code."""
