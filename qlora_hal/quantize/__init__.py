"""Formats that need calibration: a 16-bit model becomes a quantized folder."""
