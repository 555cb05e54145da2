"""Which layers to pair: what every choice costs on calibration text, and the choice."""
