"""What a step costs: by arithmetic (shapes, flops, memory), and measured by ``scripts/bench.py``."""
