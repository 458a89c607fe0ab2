"""Products with the frozen base in 8-bit floats (`Compute.fp8_products`), in place of those in the compute dtype."""
