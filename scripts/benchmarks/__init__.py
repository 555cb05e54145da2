"""What ``scripts/bench.py`` measures: training steps, a sweep over shapes, the loss alone."""
